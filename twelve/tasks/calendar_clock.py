"""Calendar and clock: weekdays, times of day, dates across months and leap years. The level is how far one must count.

1: the weekday some days later or earlier. 2: a time some minutes later, or the minutes between two times; 3: over
midnight. 4: a date some months later, or the days between two dates; 5: up to a year. 6: the weekday of a date, from
that of a date more than a year before.
"""

from __future__ import annotations

import re
from calendar import monthrange
from datetime import date, time
from random import Random

from twelve.tasks.problem import Problem, check
from twelve.tasks.verify import answer_score, final_answer, plain

LARGEST_LEVEL = 6
DAY = 24 * 60  # minutes
DAYS = {4: range(60, 151), 5: range(200, 366), 6: range(366, 551)}  # between two dates, by level
FIRST, LAST = date(2000, 1, 1).toordinal(), date(2096, 12, 31).toordinal()
WEEKDAYS = {
    "Monday": "월요일", "Tuesday": "화요일", "Wednesday": "수요일", "Thursday": "목요일", "Friday": "금요일",
    "Saturday": "토요일", "Sunday": "일요일",
}  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
Asked = tuple[str, dict[str, object], list[str], int | str]  # kind, what fills its question, steps, answer
QUESTIONS = {
    "weekday later": (
        "Today is {a}. What day of the week is it in {n} days?",
        "오늘은 {a}이다. {n}일 뒤는 무슨 요일인가?",
    ),
    "weekday earlier": (
        "Today is {a}. What day of the week was it {n} days ago?",
        "오늘은 {a}이다. {n}일 전은 무슨 요일이었나?",
    ),
    "time later": (
        "What time is it {n} minutes after {a}? Answer as HH:MM on the 24-hour clock.",
        "{a}에서 {n}분 뒤는 몇 시 몇 분인가? 24시간제 HH:MM으로 답하라.",
    ),
    "minutes between": ("How many minutes is it from {a} to {b}?", "{a}부터 {b}까지는 몇 분인가?"),
    "over midnight": ("How many minutes is it from {a} to {b} the next day?", "{a}부터 다음 날 {b}까지는 몇 분인가?"),
    "date later": (
        "What date is {n} days after {a}? Answer as YYYY-MM-DD.",
        "{a}에서 {n}일 뒤는 몇 년 몇 월 며칠인가? YYYY-MM-DD로 답하라.",
    ),
    "days between": ("How many days after {a} is {b}?", "{b}은 {a}에서 며칠 뒤인가?"),
    "weekday of a date": (
        "{a} is a {w}. What day of the week is {b}?",
        "{a}은 {w}이다. {b}은 무슨 요일인가?",
    ),
}


def generate(seed: int, level: int, language: str) -> Problem:
    """Dates are of the years 2000 to 2098. InputError for another level or language."""
    check(level, LARGEST_LEVEL, language)
    draw = Random(f"calendar_clock {seed} {level}")
    if level == 1:
        kind, values, steps, answer = _weekday(draw)
    elif level <= 3:
        kind, values, steps, answer = _clock(draw, over_midnight=level == 3)
    else:
        kind, values, steps, answer = _dates(draw, level)
    key, worked = f"{kind} {' '.join(map(str, values.values()))}", "\n".join(steps)
    if language == "en":
        question = QUESTIONS[kind][0].format(**{name: _english(value) for name, value in values.items()})
    else:
        question = QUESTIONS[kind][1].format(**{name: _korean(value) for name, value in values.items()})
        answer = WEEKDAYS.get(answer, answer)
        for english, korean in WEEKDAYS.items():
            worked = worked.replace(english, korean)
    return Problem("calendar_clock", language, level, question, worked, answer, key=key)


def score(problem: Problem, text: str) -> float:
    """1 for the exact answer, else 0. Leading zeros of a time or date may be missing."""
    if isinstance(problem.answer, int) or not problem.answer[0].isdigit():
        return answer_score(problem.answer, text)
    given = plain(final_answer(text) or "")
    pattern = r"\d{1,2}:\d\d" if ":" in problem.answer else r"\d{4}-\d{1,2}-\d{1,2}"
    if not re.fullmatch(pattern, given, re.ASCII):
        return 0.0
    numbers, expected = ([int(part) for part in re.split("[:-]", each)] for each in (given, problem.answer))
    return float(numbers == expected)


def _weekday(draw: Random) -> Asked:
    names = list(WEEKDAYS)
    today, days, sign = draw.randrange(7), draw.randint(2, 60), draw.choice("+-")
    there = names[(today + (days if sign == "+" else -days)) % 7]
    steps = [f"{days}-{days // 7 * 7}={days % 7}", f"{names[today]}{sign}{days % 7}={there}"]
    return f"weekday {'later' if sign == '+' else 'earlier'}", {"a": names[today], "n": days}, steps, there


def _clock(draw: Random, over_midnight: bool) -> Asked:
    minutes = draw.randint(30, 480)
    earliest, latest = (DAY - minutes, DAY - 1) if over_midnight else (0, DAY - 1 - minutes)
    start = draw.randint(earliest, latest)
    first, second = _time(start), _time(start + minutes)
    total = start + minutes
    begin = f"{first.hour}*60+{first.minute}={start}"
    if draw.random() < 0.5:
        steps = [begin, f"{start}+{minutes}={total}"]
        if over_midnight:
            steps.append(f"{total}-{DAY}={total % DAY}")
        steps.append(f"{total % DAY}={second.hour}*60+{second.minute}")
        return "time later", {"n": minutes, "a": first}, steps, f"{second:%H:%M}"
    steps = [begin, f"{second.hour}*60+{second.minute}={total % DAY}"]
    if over_midnight:
        steps.append(f"{total % DAY}+{DAY}={total}")
    steps.append(f"{total}-{start}={minutes}")
    return "over midnight" if over_midnight else "minutes between", {"a": first, "b": second}, steps, minutes


def _dates(draw: Random, level: int) -> Asked:
    start, days = date.fromordinal(draw.randint(FIRST, LAST)), draw.choice(DAYS[level])
    end = date.fromordinal(start.toordinal() + days)
    if level < 6 and draw.random() < 0.5:
        return "date later", {"n": days, "a": start}, _ahead(start, days), f"{end:%Y-%m-%d}"
    if level < 6:
        return "days between", {"a": start, "b": end}, _between(start, end), days
    first, last = (list(WEEKDAYS)[day.weekday()] for day in (start, end))
    steps = [*_between(start, end), f"{days}-{days // 7 * 7}={days % 7}", f"{first}+{days % 7}={last}"]
    return "weekday of a date", {"a": start, "w": first, "b": end}, steps, last


def _ahead(start: date, days: int) -> list[str]:
    """What is left of the days after each month, and at last the day of the month that they reach."""
    year, month, left = start.year, start.month, monthrange(start.year, start.month)[1] - start.day
    steps = [f"{year}-{month:02}: {left + start.day}-{start.day}={left}, {days}-{left}={days - left}"]
    days -= left
    while True:
        year, month = _next_month(year, month)
        length = monthrange(year, month)[1]
        if days <= length:
            return [*steps, f"{year}-{month:02}: {days}"]
        steps.append(f"{year}-{month:02}: {days}-{length}={days - length}")
        days -= length


def _between(start: date, end: date) -> list[str]:
    """The days so far after each month."""
    year, month, total = start.year, start.month, monthrange(start.year, start.month)[1] - start.day
    steps = [f"{year}-{month:02}: {total + start.day}-{start.day}={total}"]
    while (year, month) != (end.year, end.month):
        year, month = _next_month(year, month)
        more = end.day if (year, month) == (end.year, end.month) else monthrange(year, month)[1]
        steps.append(f"{year}-{month:02}: {total}+{more}={total + more}")
        total += more
    return steps


def _next_month(year: int, month: int) -> tuple[int, int]:
    return (year, month + 1) if month < 12 else (year + 1, 1)


def _time(minutes: int) -> time:
    return time(minutes // 60 % 24, minutes % 60)


def _english(value: object) -> str:
    if isinstance(value, date):
        return f"{MONTHS[value.month - 1]} {value.day}, {value.year}"
    if isinstance(value, time):
        return f"{value.hour % 12 or 12}:{value.minute:02} {'AM' if value.hour < 12 else 'PM'}"
    return str(value)


def _korean(value: object) -> str:
    if isinstance(value, date):
        return f"{value.year}년 {value.month}월 {value.day}일"
    if isinstance(value, time):  # midnight is 오전 0시, noon 오후 12시
        half, hour = ("오전", value.hour) if value.hour < 12 else ("오후", value.hour % 12 or 12)
        return f"{half} {hour}시 {value.minute}분" if value.minute else f"{half} {hour}시"
    return WEEKDAYS.get(str(value), str(value))
