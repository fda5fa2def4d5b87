"""Little stories with a calculation in them. The level is the number of operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from twelve.tasks.korean import Noun
from twelve.tasks.problem import Chain, Problem, check
from twelve.tasks.verify import integer_score

LARGEST_LEVEL = 10
Told = Mapping[str, str]  # language -> sentence; Korean nouns take their particle in the placeholder


@dataclass(frozen=True)
class Story:
    """How one kind of story begins, what may happen in it (by operation), and what it asks."""

    opening: Told
    events: Mapping[str, tuple[Told, ...]]
    question: Told
    grouped: bool = False  # it opens with `groups` times `n`: the first operation


THINGS = (  # English, Korean, and what Korean counts it by
    ("apples", "사과", "개"),
    ("pencils", "연필", "자루"),
    ("books", "책", "권"),
    ("cards", "카드", "장"),
    ("flowers", "꽃", "송이"),
    ("balls", "공", "개"),
)
NAMES = (("Minsu", "민수"), ("Jieun", "지은"), ("Hana", "하나"), ("Jun", "준"), ("Sora", "소라"), ("Byeol", "별"))
STORIES = (
    Story(
        opening={"en": "{name} has {n} {thing}.", "ko": "{name:은/는} {thing:을/를} {n}{unit} 가지고 있다."},
        events={
            "+": (
                {"en": "{name} buys {n} more.", "ko": "{n}{unit:을/를} 더 산다."},
                {"en": "{friend} brings {n}.", "ko": "{friend:이/가} {n}{unit:을/를} 가져온다."},
            ),
            "-": (
                {"en": "{name} gives {n} to {friend}.", "ko": "{friend}에게 {n}{unit:을/를} 준다."},
                {"en": "{name} loses {n}.", "ko": "{n}{unit:을/를} 잃어버린다."},
            ),
            "*": ({"en": "Soon there are {n} times as many.", "ko": "곧 {n}배로 늘어난다."},),
            "/": ({"en": "{name} keeps one of {n} equal parts.", "ko": "똑같이 {n}묶음으로 나누어 하나만 갖는다."},),
        },
        question={"en": "How many {thing} does {name} have?", "ko": "{name:은/는} {thing:이/가} 몇 {unit} 있나?"},
    ),
    Story(
        opening={"en": "A bus carries {n} people.", "ko": "버스에 {n}명이 타고 있다."},
        events={
            "+": ({"en": "It picks up {n}.", "ko": "{n}명이 탄다."},),
            "-": ({"en": "It drops off {n}.", "ko": "{n}명이 내린다."},),
        },
        question={"en": "How many people are on the bus?", "ko": "버스에 몇 명이 있나?"},
    ),
    Story(
        opening={"en": "{name} has {n} dollars.", "ko": "{name:은/는} {n}원을 가지고 있다."},
        events={
            "+": ({"en": "{name} earns {n}.", "ko": "{n}원을 번다."},),
            "-": (
                {"en": "{name} spends {n}.", "ko": "{n}원을 쓴다."},
                {"en": "{name} lends {friend} {n}.", "ko": "{friend}에게 {n}원을 빌려준다."},
            ),
            "*": ({"en": "The money becomes {n} times as much.", "ko": "돈이 {n}배가 된다."},),
        },
        question={"en": "How many dollars does {name} have?", "ko": "{name:은/는} 몇 원이 있나?"},
    ),
    Story(
        opening={
            "en": "A shop has {groups} boxes of {n} {thing}.",
            "ko": "가게에 {thing:이/가} {n}{unit}씩 {groups}상자 있다.",
        },
        events={
            "+": ({"en": "It gets {n} more.", "ko": "{n}{unit:이/가} 더 들어온다."},),
            "-": ({"en": "It sells {n}.", "ko": "{n}{unit:이/가} 팔린다."},),
        },
        question={"en": "How many {thing} are there?", "ko": "{thing:은/는} 모두 몇 {unit}인가?"},
        grouped=True,
    ),
    Story(
        opening={"en": "A library has {n} books.", "ko": "도서관에 책이 {n}권 있다."},
        events={
            "+": ({"en": "{name} returns {n}.", "ko": "{name:이/가} {n}권을 돌려준다."},),
            "-": ({"en": "{friend} borrows {n}.", "ko": "{friend:이/가} {n}권을 빌려 간다."},),
        },
        question={"en": "How many books are there?", "ko": "책은 몇 권인가?"},
    ),
)
START = range(2, 31)
GROUPS, GROUP = range(2, 10), range(2, 10)


def generate(seed: int, level: int, language: str) -> Problem:
    """Every number in it is 0 to 99. InputError for another level or language."""
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"word_problems {seed} {level}")
    story, thing = draw.choice(STORIES), draw.choice(THINGS)
    name, friend = draw.sample(NAMES, 2)
    if story.grouped:
        groups, each = draw.choice(GROUPS), draw.choice(GROUP)
        chain = Chain(draw, groups)
        chain.apply("*", each)
    else:
        groups, each = 0, draw.choice(START)
        chain = Chain(draw, each)
    told = [(story.opening, each)]
    while len(chain.steps) < level:
        operation, number = chain.extend(list(story.events))
        told.append((draw.choice(story.events[operation]), number))
    korean = language == "ko"
    words = {
        "name": Noun(name[korean]), "friend": Noun(friend[korean]), "thing": Noun(thing[korean]),
        "unit": Noun(thing[2]), "groups": groups,
    }  # fmt: skip
    sentences = [sentence[language].format(n=Noun(number), **words) for sentence, number in told]
    question = " ".join([*sentences, story.question[language].format(**words)])
    return Problem("word_problems", language, level, question, "\n".join(chain.steps), chain.total)


def score(problem: Problem, text: str) -> float:
    """1 for the exact answer, else 0."""
    return integer_score(problem.answer, text)
