"""Logic puzzles with one solution: the order of people, or the liar among them. The level is their count less two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from twelve.tasks.korean import Noun
from twelve.tasks.problem import Problem, check
from twelve.tasks.verify import answer_score

LARGEST_LEVEL = 5
PEOPLE = (
    ("Minsu", "민수"), ("Jieun", "지은"), ("Hana", "하나"), ("Jun", "준"), ("Sora", "소라"), ("Byeol", "별"),
    ("Yujin", "유진"), ("Taeho", "태호"), ("Narae", "나래"), ("Dohyun", "도현"), ("Sol", "솔"), ("Gaon", "가온"),
)  # fmt: skip
ORDERS = {  # more, less, most; in Korean the last one without its beginning
    "height": (("taller", "shorter", "tallest"), ("키가 크다", "키가 작다", "키가 ", "큰")),
    "age": (("older", "younger", "oldest"), ("나이가 많다", "나이가 적다", "나이가 ", "많은")),
    "speed": (("faster", "slower", "fastest"), ("빠르다", "느리다", "", "빠른")),
}
PLACES = (
    ("", "가장"), ("second ", "두 번째로"), ("third ", "세 번째로"), ("fourth ", "네 번째로"),
    ("fifth ", "다섯 번째로"), ("sixth ", "여섯 번째로"), ("seventh ", "일곱 번째로"),
)  # fmt: skip
Statement = tuple[int, int, bool]  # who speaks, of whom, and whether he calls him a liar
Told = tuple[str, Sequence[int]]  # what a question says but for the names, and whose come in which order


def generate(seed: int, level: int, language: str) -> Problem:
    """InputError for another level or language."""
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"logic {seed} {level}")
    people = draw.sample(PEOPLE, level + 2)
    names = [Noun(person[language == "ko"]) for person in people]
    make = draw.choice((_order, _liar))
    question, steps, answer, (said, order) = make(draw, names, language)
    key = f"{said} {' '.join(people[index][0] for index in order)}"  # of a question, in whatever order names were drawn
    return Problem("logic", language, level, question, "\n".join(steps), str(names[answer]), key=key)


def score(problem: Problem, text: str) -> float:
    """1 for the name asked for, else 0."""
    return answer_score(problem.answer, text)


def _order(draw: Random, names: list[Noun], language: str) -> tuple[str, list[str], int, Told]:
    """Neighbours are compared, so only one order is possible. The steps join a clue at a time to the chain."""
    kind, order = draw.choice(list(ORDERS)), draw.sample(range(len(names)), len(names))
    clues = list(pairwise(order))
    draw.shuffle(clues)
    turned = [draw.random() < 0.5 for _ in clues]
    place = draw.randrange(len(order))
    english, korean = ORDERS[kind]
    told = []
    for (more, less), is_turned in zip(clues, turned, strict=True):
        first, second = (names[less], names[more]) if is_turned else (names[more], names[less])
        if language == "ko":
            told.append(f"{first:은/는} {second}보다 {korean[is_turned]}.")
        else:
            told.append(f"{first} is {english[is_turned]} than {second}.")
    if language == "ko":
        told.append(f"{korean[2]}{PLACES[place][1]} {korean[3]} 사람은 누구인가?")
    else:
        told.append(f"Who is the {PLACES[place][0]}{english[2]}?")
    chain, left, steps = list(clues[0]), clues[1:], []
    while True:
        steps.append(">".join(names[person] for person in chain))
        if not left:
            break
        clue = next(clue for clue in left if clue[1] == chain[0] or clue[0] == chain[-1])
        left.remove(clue)
        chain = [clue[0], *chain] if clue[1] == chain[0] else [*chain, clue[1]]
    return " ".join(told), steps, order[place], (f"{kind} {place}", order)


def _liar(draw: Random, names: list[Noun], language: str) -> tuple[str, list[str], int, Told]:
    """Everyone speaks once of another. The steps suppose of each in turn that he is the liar, and say whose words would
    then be true (1) and whose false (0)."""
    people = range(len(names))
    while True:
        liar = draw.choice(people)
        statements = [_statement(draw, speaker, liar, people) for speaker in people]
        found = [_supposing(liar, statements) for liar in people]
        if [person for person in people if found[person] == [other != person for other in people]] == [liar]:
            break
    listed = ", ".join(names)
    if language == "ko":
        told = [f"{listed} 가운데 거짓말쟁이는 한 명이고, 그 사람의 말만 거짓이다."]
        for speaker, other, accused in statements:
            claim = f"{names[other]:은/는} 거짓말쟁이{'다' if accused else '가 아니다'}"
            told.append(f'{names[speaker]:은/는} "{claim}"라고 말한다.')
        told.append("거짓말쟁이는 누구인가?")
    else:
        told = [f"One of {listed} is a liar, and only what the liar says is false."]
        for speaker, other, accused in statements:
            told.append(f'{names[speaker]} says "{names[other]} is {"" if accused else "not "}a liar".')
        told.append("Who is the liar?")
    steps = [f"{names[person]}: {''.join('1' if true else '0' for true in found[person])}" for person in people]
    return " ".join(told), steps, liar, (f"liar {statements}", people)


def _statement(draw: Random, speaker: int, liar: int, people: range) -> Statement:
    other = draw.choice([person for person in people if person != speaker])
    return speaker, other, (other == liar) == (speaker != liar)


def _supposing(liar: int, statements: list[Statement]) -> list[bool]:
    """Which statements are true if this person is the liar."""
    return [(other == liar) == accused for _, other, accused in statements]
