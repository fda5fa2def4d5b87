"""The generators: repeatable, right, one answer each, kept apart in training and test, in correct Korean, and harder
from level to level. What is expected is worked out here from the questions, without the generators' code."""

import re
from collections import Counter
from datetime import date, timedelta
from fractions import Fraction
from functools import cache
from itertools import islice, pairwise, permutations, product
from random import Random

import pytest

from twelve import tasks
from twelve.tasks import code, countdown, sequences
from twelve.tasks.korean import final_consonant

NAMES = tasks.names()
LEVELS = [(name, level) for name in NAMES for level in range(1, tasks.get(name).LARGEST_LEVEL + 1)]
SEEDS = 100


@cache
def some(name, level, language="en", count=SEEDS):
    return [tasks.get(name).generate(seed, level, language) for seed in range(count)]


# --- all of them ------------------------------------------------------------------------------------------------------

WORDS = {
    "Monday": "월요일", "Tuesday": "화요일", "Wednesday": "수요일", "Thursday": "목요일", "Friday": "금요일",
    "Saturday": "토요일", "Sunday": "일요일", "Minsu": "민수", "Jieun": "지은", "Hana": "하나", "Jun": "준",
    "Sora": "소라", "Byeol": "별", "Yujin": "유진", "Taeho": "태호", "Narae": "나래", "Dohyun": "도현", "Sol": "솔",
    "Gaon": "가온", "apple": "사과", "cloud": "구름", "train": "기차", "chair": "의자", "shoes": "신발",
    "onion": "양파", "paper": "종이", "music": "음악", "clock": "시계", "grape": "포도", "whale": "고래",
    "bicycle": "자전거", "cabbage": "양배추", "dolphin": "돌고래", "gorilla": "고릴라", "library": "도서관",
    "teacher": "선생님", "sweater": "스웨터", "sunflower": "해바라기", "helicopter": "헬리콥터",
    "harmonica": "하모니카", "accordion": "아코디언", "spaghetti": "스파게티", "supermarket": "슈퍼마켓",
}  # fmt: skip


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_both_languages_ask_the_same_and_every_call_does(name, level):
    for english, korean, again in zip(*(some(name, level, each) for each in ("en", "ko", "ko")), strict=True):
        assert korean == again and hash(korean) == hash(again)
        assert (english.task, english.level, english.language, korean.language) == (name, level, "en", "ko")
        assert korean.answer == WORDS.get(english.answer, english.answer)
        assert (korean.key, korean.data) == (english.key, english.data)
        assert tasks.is_held_out(korean) == tasks.is_held_out(english)
        assert english.question.isascii() and english.steps.isascii()
        assert re.search("[가-힣]", korean.question) and not re.search("[{}]", korean.question + english.question)


@pytest.mark.parametrize(("name", "level"), [each for each in LEVELS if each[0] != "code"])
def test_the_worked_answer_scores_and_a_changed_one_does_not(name, level):
    task = tasks.get(name)
    for language in ("en", "ko"):
        for problem, other in zip(some(name, level, language), some(name, level, language)[1:], strict=False):
            solution = problem.messages()[1]["content"]
            answer = str(problem.answer)
            assert task.score(problem, solution) == 1
            wrong = ["", answer + "1", "1" + answer, f"{answer} {answer}", f"-({answer})", answer[:-1]]
            if other.answer != problem.answer and name != "countdown":
                wrong.append(other.answer)
            for each in wrong:
                changed = solution.replace(f"<answer>{answer}<", f"<answer>{each}<")
                assert task.score(problem, changed) == 0, (problem, each)


def test_questions_vary():
    for name, level in LEVELS:
        problems = some(name, level, count=100)
        assert len({problem.question for problem in problems}) > 60, (name, level)
        assert len({problem.answer for problem in problems}) >= 6, (name, level)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_test_is_in_training(name):
    levels = range(1, tasks.get(name).LARGEST_LEVEL + 1)
    count = 30 * len(levels)
    train, test = (list(islice(tasks.problems(name, split, 3, levels), count)) for split in ("train", "test"))
    for content in (lambda p: p.key or p.steps, lambda p: p.question):
        assert not set(map(content, train)) & set(map(content, test))
    assert {problem.language for problem in test} == {"ko", "en"} and {problem.level for problem in test} == set(levels)


def test_questions_that_read_alike_are_one():
    """Whatever order the names of a puzzle were drawn in."""
    keys = {}
    for seed in range(20_000):
        problem = tasks.get("logic").generate(seed, 1, "en")
        assert keys.setdefault(problem.question, problem.key) == problem.key
    assert len(keys) < 19_000  # some came twice


# --- harder from level to level ---------------------------------------------------------------------------------------


def right_by_steps(problem, number):
    """A solver that does the worked steps and slips in one of 25."""
    draw = Random(number)
    return all(draw.random() > 0.04 for _ in problem.steps.split("\n"))


def right_by_search(problem, number):
    """A solver that joins the numbers at random, 40 times."""
    draw = Random(number)
    for _ in range(40):
        left = [Fraction(n) for n in problem.data["numbers"]]
        draw.shuffle(left)
        while len(left) > 1 and problem.data["target"] not in left:
            a, b = left.pop(draw.randrange(len(left))), left.pop(draw.randrange(len(left)))
            left.append(draw.choice([a + b, a - b, a * b] + ([a / b] if b else [])))
        if problem.data["target"] in left:
            return True
    return False


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_strictly_harder(name):
    solve = right_by_search if name == "countdown" else right_by_steps
    shares = []
    for level in range(1, tasks.get(name).LARGEST_LEVEL + 1):
        problems = some(name, level, count=400)
        shares.append(sum(solve(problem, number) for number, problem in enumerate(problems)) / len(problems))
    assert all(later < earlier for earlier, later in pairwise(shares)), shares


# --- one answer each, and the right one -------------------------------------------------------------------------------


def test_countdown_takes_every_valid_expression():
    problem = tasks.Problem("countdown", "en", 2, "?", "", "(3+5)*4", {"numbers": [3, 5, 4, 8], "target": 32})
    for right in ("(3+5)*4", "4 * (5 + 3)", "8*4", "4×8", "(3+5)*4=32", "-(-8*4)", "8*(3+5-4)",
                  "32 = 8*4", r"8 \times 4", r"$8\cdot4$", r"8\times(3+5-4)"):  # fmt: skip
        assert countdown.score(problem, f"<answer>{right}</answer>") == 1, right
    for wrong in ("32=32", "33=8*4", r"8\timesx4"):
        assert countdown.score(problem, f"<answer>{wrong}</answer>") == 0, wrong
    for wrong in ("32", "8*4=33", "4*4+4*4", "8*4+0", "2**5", "8*4#", "(8*4", "8//1*4", "8*4;1", "4**2+16", "8*04",
                  "[8*4]", "(" * 150 + "8*4" + ")" * 150, "8*4+1-1", "__import__('os')", "8*4.0", "8 4", "", "3/(5-5)",
                  "٨*4", "8/(5-4-3/4)", "(" * 200, "-" * 190 + "8"):  # fmt: skip
        assert countdown.score(problem, f"<answer>{wrong}</answer>") == 0, wrong
    fractions = tasks.Problem("countdown", "en", 3, "?", "", "", {"numbers": [8, 3, 9], "target": 24})
    assert countdown.score(fractions, "<answer>8/(3/9)</answer>") == 1


@pytest.mark.parametrize("level", range(1, 6))
def test_countdown_says_its_numbers(level):
    for language in ("en", "ko"):
        for problem in some("countdown", level, language):
            numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
            asked = numbers.pop()
            assert (numbers, asked) == (problem.data["numbers"], problem.data["target"])
            assert len(set(numbers)) == level + 1
            assert eval(problem.answer) == asked and asked not in numbers
            assert Counter(re.findall(r"\d+", problem.answer)) == Counter(map(str, numbers))


@pytest.mark.parametrize("level", range(1, 7))
def test_equations_hold_for_one_number_only(level):
    for problem in some("equations", level):
        asked, given = re.fullmatch(r"What is (.+) if (.+)\?", problem.question).groups()
        pairs = []
        for each in given.split(" and "):
            left, right = (re.sub(r"(\d)([xy(])", r"\1*\2", side) for side in each.split(" = "))
            pairs.append(compile(f"({left}) - ({right})", "equation", "eval"))
        values = [{"x": x, "y": y} for x, y in product(range(-40, 41), range(-40, 41) if level == 6 else (0,))]
        solutions = [each for each in values if all(eval(pair, {}, each) == 0 for pair in pairs)]
        assert [eval(asked, {}, each) for each in solutions] == [problem.answer]
        for step in problem.steps.split("\n"):
            left, right = (re.sub(r"(\d)([xy(])", r"\1*\2", side) for side in step.split("="))
            assert eval(left, {}, solutions[0]) == eval(right, {}, solutions[0])


def test_sorting_by_sorting():
    for level in range(1, 11):
        for language in ("en", "ko"):
            for problem in some("sorting", level, language):
                asked = problem.question
                numbers = [int(number) for number in re.findall(r"\d+", asked)]
                bound = numbers.pop() if "greater" in asked or "보다 큰" in asked else None
                if bound is not None:
                    expected = sum(number > bound for number in numbers)
                elif "even" in asked or "짝수" in asked:
                    expected = sum(number % 2 == 0 for number in numbers)
                elif "longest" in asked or "낱말" in asked:
                    words = re.findall(r"[a-z]+|[가-힣]+", re.sub(" 중에서.*|Which of the words | is the.*", "", asked))
                    sizes = Counter(map(len, words))
                    assert sizes[max(sizes)] == 1 and len(words) == level + 2
                    expected = max(words, key=len)
                elif place := re.search("second|third|fourth|fifth|두|세|네|다섯", asked):
                    order = "second third fourth fifth" if language == "en" else "두 세 네 다섯"
                    expected = sorted(numbers)[order.split().index(place[0]) + 1]
                else:
                    down = "largest to" in asked or "큰 수부터" in asked
                    expected = ", ".join(map(str, sorted(numbers, reverse=down)))
                assert problem.answer == expected
                assert not numbers or len(set(numbers)) == level + 2


def test_sorted_numbers_may_be_written_in_other_ways():
    task, problem = tasks.get("sorting"), tasks.Problem("sorting", "en", 1, "?", "", "3, 15, 27")
    for text in ("3, 15, 27", "3 15 27", "[3, 15, 27]", "3,15,27", "3, 15, 27.", "$3, 15, 27$", "3\n15\n27"):
        assert task.score(problem, f"<answer>{text}</answer>") == 1
    for text in ("31527", "3, 15", "3, 27, 15", "3, 15, 27, 27", "3.15.27", "3, 15, 27 or 3, 27, 15", "03, 15, 27"):
        assert task.score(problem, f"<answer>{text}</answer>") == 0


DAYS = list(WORDS)[:7]
MONTHS = [date(2000, month, 1).strftime("%B") for month in range(1, 13)]


def test_calendar_and_clock_by_the_standard_library():
    def dates(text):
        found = re.findall(rf"({'|'.join(MONTHS)}) (\d+), (\d+)", text)
        return [date(int(year), MONTHS.index(month) + 1, int(day)) for month, day, year in found]

    def minutes(text):
        found = re.findall(r"(\d+):(\d\d) (AM|PM)", text)
        return [int(hour) % 12 * 60 + int(minute) + 720 * (half == "PM") for hour, minute, half in found]

    def korean_minutes(text):
        found = re.findall(r"(오전|오후) (\d+)시(?: (\d+)분)?", text)
        return [int(hour) % 12 * 60 + int(minute or 0) + 720 * (half == "오후") for half, hour, minute in found]

    for level in range(1, 7):
        for problem, korean in zip(some("calendar_clock", level), some("calendar_clock", level, "ko"), strict=True):
            asked, (days, times) = problem.question, (dates(problem.question), minutes(problem.question))
            amount = int(found[1]) if (found := re.search(r"(\d+) (?:days|minutes)", asked)) else None
            if level == 1:
                start = DAYS.index(re.search("|".join(DAYS), asked)[0])
                expected = DAYS[(start + (-amount if "ago" in asked else amount)) % 7]
            elif times and amount:
                end = (times[0] + amount) % 1440
                expected = f"{end // 60:02}:{end % 60:02}"
            elif times:
                expected = times[1] - times[0] + 1440 * ("next day" in asked)
                assert 0 < expected < 1440
            elif amount:
                expected = str(days[0] + timedelta(amount))
            elif level == 6:
                assert DAYS[days[0].weekday()] in asked
                expected = DAYS[days[1].weekday()]
            else:
                expected = (days[1] - days[0]).days
            assert problem.answer == expected, problem
            assert korean_minutes(korean.question) == times
            said = [date(*map(int, each)) for each in re.findall(r"(\d+)년 (\d+)월 (\d+)일", korean.question)]
            assert sorted(said) == sorted(days)


def test_leading_zeros_of_times_and_dates():
    task = tasks.get("calendar_clock")
    for answer, same, other in (("09:05", "9:05", "9:5"), ("2024-03-05", "2024-3-5", "2024-05-03")):
        problem = tasks.Problem("calendar_clock", "en", 2, "?", "", answer)
        assert task.score(problem, f"<answer>{same}</answer>") == task.score(problem, f"<answer>{same}.</answer>") == 1
        assert task.score(problem, f"<answer>{other}</answer>") == 0


IN_SMALLEST = {
    "mm": 1, "cm": 10, "m": 1000, "km": 10**6, "g": 1, "kg": 1000, "t": 10**6, "mL": 1, "L": 1000, "seconds": 1,
    "minutes": 60, "hours": 3600, "days": 86400, "won": 1, "man won": 10**4, "eok won": 10**8,
    "초": 1, "분": 60, "시간": 3600, "일": 86400, "원": 1, "만 원": 10**4, "억 원": 10**8,
}  # fmt: skip


@pytest.mark.parametrize("level", range(1, 6))
def test_units_in_the_smallest(level):
    names = "|".join(sorted(IN_SMALLEST, key=len, reverse=True))
    for language in ("en", "ko"):
        for problem in some("units", level, language):
            asked = problem.question.split(" (")[0]
            amounts = re.findall(rf"(\d+(?:\.\d+)?) ?({names})(?![a-z])", asked)
            target = re.search(rf"in ({names})\?|몇 ({names})인가", asked)
            total = sum(Fraction(amount) * IN_SMALLEST[unit] for amount, unit in amounts)
            assert len(amounts) == level
            assert Fraction(problem.answer) * IN_SMALLEST[target[1] or target[2]] == total
            assert re.fullmatch(r"[1-9]\d*|\d+\.\d*[1-9]", str(problem.answer))


def consistent(question):
    """Every answer that what is said leaves open."""
    if "liar" in question:
        names = re.match("One of (.*?) is a liar", question)[1].split(", ")
        said = re.findall(r'(\w+) says "(\w+) is (not )?a liar"', question)
        return [
            liar for liar in names
            if all(((other == liar) != bool(negated)) == (speaker != liar) for speaker, other, negated in said)
        ]  # fmt: skip
    clues = []
    for first, word, second in re.findall(r"(\w+) is (\w+) than (\w+)\.", question):
        clues.append((second, first) if word in ("shorter", "younger", "slower") else (first, second))
    names = sorted({name for clue in clues for name in clue})
    place = re.search(r"Who is the (?:(\w+) )?\w+\?", question)[1] or "first"
    place = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh"].index(place)
    return [
        order[place] for order in permutations(names)
        if all(order.index(more) < order.index(less) for more, less in clues)
    ]  # fmt: skip


@pytest.mark.parametrize("level", range(1, 6))
def test_logic_leaves_one_answer(level):
    for problem in some("logic", level, count=SEEDS if level < 5 else 30):
        assert consistent(problem.question) == [problem.answer]


def next_terms(terms):
    """What each rule of the set that fits would give, each found by trying numbers."""
    d = [b - a for a, b in pairwise(terms)]
    if len(set(d)) == 1:
        yield terms[-1] + d[0]
    if all(a * terms[1] == b * terms[0] for a, b in pairwise(terms)):
        yield Fraction(terms[-1] * terms[1], terms[0])
    if len({b - a for a, b in zip(terms, terms[2:], strict=False)}) == 1:
        yield terms[-2] + terms[2] - terms[0]
    if all(a + b == c for a, b, c in zip(terms, terms[1:], terms[2:], strict=False)):
        yield terms[-1] + terms[-2]
    if len({b - a for a, b in pairwise(d)}) == 1:
        yield terms[-1] + d[-1] + d[1] - d[0]
    if all(a * d[1] == b * d[0] for a, b in pairwise(d)):
        yield terms[-1] + Fraction(d[-1] * d[1], d[0])


@pytest.mark.parametrize("level", range(1, 7))
def test_sequences_go_on_in_one_way(level):
    for problem in some("sequences", level):
        terms = [int(term) for term in re.findall(r"-?\d+", problem.question)]
        assert len(terms) == 5 and set(next_terms(terms)) == {problem.answer}
        assert next(rule for rule in range(1, 7) if sequences.fits(rule, terms)) == level


@pytest.mark.parametrize("level", range(1, 6))
def test_code_passes_its_tests_and_needs_every_line(level):
    for problem in some("code", level, count=60):
        lines = problem.answer.split("\n")
        assert len(lines) == level + 2
        for left_out in range(len(lines) - 1):
            source = "\n".join(lines[:left_out] + lines[left_out + 1 :]) if left_out else problem.answer
            found = {}
            exec(source, found)
            try:
                exec(problem.data["tests"], found)
                passed = True
            except AssertionError:
                passed = False
            assert passed == (left_out == 0), (source, problem.data)


def test_code_is_judged_wherever_it_stands(monkeypatch):
    judged = []
    monkeypatch.setattr(code, "run_tests", lambda source, tests: judged.append(source) or "return" in source)
    problem = code.generate(0, 1, "en")
    block = f"```python\n{problem.answer}\n```"
    for text in (problem.messages()[1]["content"], block, f"<answer>{block}</answer>", f"so:\n{block}\nas asked",
                 f"```\nno\n```\n{block}", f"<think>```python\nx\n```</think>{block}",
                 f"{block}\nIt prints\n```\n[1]\n```", f"```text\n[1]\n```\n{block}", f"{block}\n```py\ncut off",
                 block.replace("python", "Python3"), block.replace("\n", "\r\n")):  # fmt: skip
        assert code.score(problem, text) == 1
        assert judged[-1].strip().replace("\r", "") == problem.answer
    count = len(judged)
    for text in ("", problem.answer, f"<think>{block}", f"<think>{block}</think>", "<answer></answer>"):
        assert code.score(problem, text) == 0, text
    assert len(judged) == count


def test_code_runs():
    problem = code.generate(1, 3, "ko")
    solution = problem.messages()[1]["content"]
    assert code.score(problem, solution) == 1
    assert code.score(problem, solution.replace("return ", "return 1 or ")) == 0


# --- particles --------------------------------------------------------------------------------------------------------

ENDS = {  # how numbers, letters, units and names end when read aloud: in ㄹ, in another consonant; the rest in a vowel
    **dict.fromkeys(("1", "7", "8", "별", "솔", "일"), "ㄹ"),
    **dict.fromkeys(("0", "3", "6", "kg", "g", "t", "M", "지은", "준", "유진", "도현", "가온", "원", "명", "권", "분",
                     "시간"), "x"),
}  # fmt: skip
PAIRS = ("은/는", "이/가", "을/를", "과/와", "으로/로")
NAMED = ("민수", "지은", "하나", "준", "소라", "별", "유진", "태호", "나래", "도현", "솔", "가온")
READ = re.compile(
    rf"(?<![가-힣])((?:{'|'.join(NAMED)})|[A-Z]+|"
    r"[0-9]+(?:\.[0-9]+)?(?:km|cm|mm|m|kg|g|t|mL|L|만 원|억 원|원|시간|분|초|일|명|권|개)?)"
    r"(은|는|이|가|을|를|과|와|으로|로)(?![가-힣])"
)


def test_particles_fit_what_they_follow():
    seen = Counter()
    for name, level in LEVELS:
        for problem in some(name, level, "ko", count=100):
            for word, particle in READ.findall(problem.question):
                end = next((ENDS[each] for each in sorted(ENDS, key=len, reverse=True) if word.endswith(each)), "")
                pair = next(pair for pair in PAIRS if particle in pair.split("/"))
                consonant = bool(end) and not (pair == "으로/로" and end == "ㄹ")
                assert particle == pair.split("/")[not consonant], (word, particle, problem.question)
                seen[pair, end] += 1
    assert all(seen[pair, end] for pair in ("은/는", "을/를") for end in ("ㄹ", "x", "")), seen
    assert sum(seen.values()) > 3000


@pytest.mark.parametrize(
    ("word", "final"),
    [
        ("3kg", "ㅁ"), ("3 kg", "ㅁ"), ("2cm", ""), ("2m", ""), ("7km", ""), ("5g", "ㅁ"), ("5t", "ㄴ"), ("1L", ""),
        ("9mL", ""), ("m", "ㅁ"), ("n", "ㄴ"), ("x", ""), ("L", "ㄹ"), ("R", "ㄹ"), ("HH:MM", "ㅁ"), ("YYYY-MM-DD", ""),
        ("Tom", ""), ("kg", "ㅁ"), ("-3", "ㅁ"), ("2.5", ""), ("3.0kg", "ㅁ"),
    ],
)  # fmt: skip
def test_letters_and_units_as_they_are_read(word, final):
    assert final_consonant(word) == final
