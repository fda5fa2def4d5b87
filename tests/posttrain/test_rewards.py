"""What answers are worth: the form to the letter, words by their script, and sums that say what they should."""

import pytest

from twelve import tasks
from twelve.posttrain.rewards import Rewards, language_share, well_formed
from twelve.tasks import Problem

GOOD = "<think>1+1=2</think><answer>2</answer>"


@pytest.mark.parametrize("text", [GOOD, f" \n{GOOD}\n", "<think>\n1 < 2\n\nso</think>\n\n<answer>\n2\n</answer>"])
def test_reasoning_and_then_an_answer_are_well_formed(text):
    assert well_formed(text) == 1


@pytest.mark.parametrize(
    "text",
    ["", "2", "<answer>2</answer>", "<think>1+1=2</think>", "<think>1+1=2</think>2",
     "<think></think><answer>2</answer>", "<think> \n</think><answer>2</answer>",
     "<think>1+1=2</think><answer> </answer>", f"so {GOOD}", f"{GOOD} bye",
     GOOD + GOOD, "<think>1<think>1</think></think><answer>2</answer>", "<think>1</think><answer>2<answer></answer>",
     "<answer>2</answer><think>1</think>", "<think>1</think> so <answer>2</answer>", "<think>1</think><answer>2",
     "<THINK>1</THINK><answer>2</answer>", "<think>1<answer>2</answer></think>"],
)  # fmt: skip
def test_anything_else_is_not(text):
    assert well_formed(text) == 0


@pytest.mark.parametrize(
    ("reasoning", "korean", "english"),
    [
        ("The ship has 3 sails", 0, 1),
        ("배에 돛이 3개 있다", 1, 0),
        ("배에 돛이 three", 2 / 3, 1 / 3),
        ("1+2=3\n3*4=12", 1, 1),  # numbers only: in no language, so not in a wrong one
        ("3x+5=14, x=3", 1, 1),  # names and units are nobody's
        ("12 km - 500 m = 11500 m", 1, 1),
        ("2km를 걷는다", 1, 0),
        ("apple은 과일이다", 1, 0),  # Korean takes foreign words in with a particle; English does not
        ("café au lait", 0, 1),
        ("苹果 有三个", 0, 0),
        ("Сколько будет", 0, 0),
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", 1, 0),  # the letters of 한글 one by one
        ("배 배 배 배 배 배 배 ship", 7 / 8, 1 / 8),
        ("snake_case 변수", 1 / 3, 2 / 3),
    ],
)
def test_the_share_of_a_language(reasoning, korean, english):
    for language, share in (("ko", korean), ("en", english)):
        assert language_share(f"<think>{reasoning}</think><answer>답 answer</answer>", language) == pytest.approx(share)
    assert language_share(f"<think>{reasoning}</think>", "xx") == 1


def test_without_reasoning_all_of_the_text_counts_and_tags_never_do():
    assert language_share("<answer>열두 척</answer>", "ko") == 1
    assert language_share("<answer>열두 척</answer>", "en") == 0
    assert language_share("<think>열두 척 <answer>12", "ko") == 1  # cut off within
    assert language_share("음 <think>열두</think><answer>12</answer>", "ko") == 1
    assert language_share("", "ko") == language_share("<think></think>", "en") == 1


@pytest.mark.parametrize("name", tasks.names())
def test_every_worked_solution_has_all_of_form_and_language(name):
    task = tasks.get(name)
    for language in tasks.LANGUAGES:
        for level in range(1, task.LARGEST_LEVEL + 1):
            for seed in range(8):
                problem = task.generate(seed, level, language)
                text = problem.messages()[-1]["content"]
                assert language_share(text, language) == 1, text
                assert well_formed(text) == 1 or not problem.steps, text


def test_a_reward_is_the_sum_of_its_parts():
    problem = Problem("t", "ko", 1, "1+1", "1+1=2", 2)
    rewards = Rewards(format=1.0, language=0.5, length=0.1)
    assert Rewards().of(problem, GOOD, 0.25, 9, 10) == 0.25
    assert rewards.of(problem, GOOD, 1.0, 5, 10) == pytest.approx(1 + 1 + 0.5 - 0.05)
    assert rewards.of(problem, "two", 0.0, 5, 10) == 0  # neither form nor language, and no penalty for what is wrong
    assert rewards.of(problem, "<think>one more</think><answer>2</answer>", 0.5, 10, 10) == pytest.approx(0.5 + 1)
    short, long = (rewards.of(problem, GOOD, 1.0, tokens, 10) for tokens in (3, 9))
    assert short > long
