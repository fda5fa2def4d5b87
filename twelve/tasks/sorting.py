"""Sorting and counting. The level is the count of items less two."""

from __future__ import annotations

import re
from random import Random

from twelve.tasks.korean import Noun
from twelve.tasks.problem import Problem, check
from twelve.tasks.verify import answer_score, final_answer, plain

LARGEST_LEVEL = 10
NUMBERS = range(1, 100)
ORDINALS = {2: ("second", "두"), 3: ("third", "세"), 4: ("fourth", "네"), 5: ("fifth", "다섯")}
WORDS = (  # by length, the same in both languages: one to four syllables in Korean
    ("sun 해", "cow 소", "egg 알", "dog 개", "rice 쌀", "bear 곰", "moon 달", "book 책", "door 문", "hand 손",
     "snow 눈", "star 별", "foot 발", "nose 코"),
    ("apple 사과", "cloud 구름", "train 기차", "chair 의자", "shoes 신발", "onion 양파", "paper 종이",
     "music 음악", "clock 시계", "grape 포도", "whale 고래"),
    ("bicycle 자전거", "cabbage 양배추", "dolphin 돌고래", "gorilla 고릴라", "library 도서관", "teacher 선생님",
     "sweater 스웨터"),
    ("sunflower 해바라기", "helicopter 헬리콥터", "harmonica 하모니카", "accordion 아코디언", "spaghetti 스파게티",
     "supermarket 슈퍼마켓"),
)  # fmt: skip
KOREAN = {
    "up": "{items:을/를} 작은 수부터 차례로 쓰면?",
    "down": "{items:을/를} 큰 수부터 차례로 쓰면?",
    "small": "{items} 중에서 {word} 번째로 작은 수는?",
    "greater": "{items} 중에서 {bound}보다 큰 수는 몇 개인가?",
    "even": "{items} 중에서 짝수는 몇 개인가?",
    "longest": "{items} 중에서 글자 수가 가장 많은 낱말은?",
}
ENGLISH = {
    "up": "Sort {items} from smallest to largest.",
    "down": "Sort {items} from largest to smallest.",
    "small": "What is the {word} smallest of {items}?",
    "greater": "How many of {items} are greater than {bound}?",
    "even": "How many of {items} are even?",
    "longest": "Which of the words {items} is the longest?",
}


def generate(seed: int, level: int, language: str) -> Problem:
    """Numbers are 1 to 99, no two alike; one word is longer than all others.

    InputError for another level or language.
    """
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"sorting {seed} {level}")
    count, korean = level + 2, language == "ko"
    kind = draw.choice(list(ENGLISH))
    numbers = draw.sample(NUMBERS, count)
    rank, bound = draw.randint(2, min(5, count - 1)), draw.randint(20, 80)
    pairs = _words(draw, count)
    words = [pair.split()[korean] for pair in pairs]
    items = words if kind == "longest" else numbers
    answer: int | str
    if kind == "longest":
        steps, answer = [f"{word} {len(word)}" for word in words], max(words, key=len)
    elif kind in ("greater", "even"):
        steps, answer = _count(numbers, bound, kind)
    else:
        ordered = sorted(numbers, reverse=kind == "down")
        steps = [
            f"{' '.join(str(n) for n in numbers if n not in ordered[:place])}: {ordered[place]}"
            for place in range(rank if kind == "small" else count - 1)
        ]
        answer = ordered[rank - 1] if kind == "small" else ", ".join(map(str, ordered))
    words_for = {"items": Noun(", ".join(map(str, items))), "word": ORDINALS[rank][korean], "bound": bound}
    question = (KOREAN if korean else ENGLISH)[kind].format(**words_for)
    asked = {"small": rank, "greater": bound}.get(kind, "")
    key = f"{kind} {asked} {' '.join(pairs) if kind == 'longest' else numbers}"
    return Problem("sorting", language, level, question, "\n".join(steps), answer, key=key)


def score(problem: Problem, text: str) -> float:
    """1 for the exact answer, else 0. Commas, blanks or brackets may stand between and around numbers in order."""
    if isinstance(problem.answer, int) or not problem.answer[0].isdigit():
        return answer_score(problem.answer, text)
    given = plain(final_answer(text) or "").strip("[]() ")
    listed = re.fullmatch(r"\d+([, ]+\d+)*", given, re.ASCII)
    return float(listed is not None and re.findall(r"\d+", given) == problem.answer.split(", "))


def _words(draw: Random, count: int) -> list[str]:
    longest = draw.randrange(1, len(WORDS))
    shorter = [pair for group in WORDS[:longest] for pair in group]
    pairs = [draw.choice(WORDS[longest]), *draw.sample(shorter, count - 1)]
    draw.shuffle(pairs)
    return pairs


def _count(numbers: list[int], bound: int, kind: str) -> tuple[list[str], int]:
    """Every number with the count so far."""
    steps, total = [], 0
    for number in numbers:
        total += number > bound if kind == "greater" else number % 2 == 0
        steps.append(f"{number} {total}")
    return steps, total
