"""Finding the final answer in what a model wrote, and comparing it with the reference exactly.

A reward that can be had without the right answer will be found by training, so what is not surely right counts 0:

- Only the answer counts that the text settles on, outside of its reasoning; "1 or 2" is no answer to either.
- Numbers are compared as fractions, never as floats: 0.5, 1/2, \\frac{1}{2}, 50% and ０.５ are equal, 0.333 and 1/3 are
  not. Commas stand between thousands (1,234), so 1,5 is no number. Nor are 1e3, ½, ², ٣, a range, or a sum.
- A unit counts: where the reference is "6개" or "6 km", so must be the answer ("6 개" too, "6" not); where it is 6, so
  must be the answer. Numbers in words (six, 여섯) are not read.
- Other answers are equal when they read alike; blanks that separate nothing and the case of words do not matter.
- Where the reference is a formula and math-verify is installed, it decides, in a process with a hard limit.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import cache
from importlib.util import find_spec

from twelve.tasks.worker import Worker

LONGEST = 1000  # characters of an answer; a longer one is wrong
LONGEST_NUMBER = 120
FORMULA_SECONDS, FORMULA_MEMORY = 3.0, 2 * 2**30
INTEGER = re.compile(r"[+-]?(?:[0-9]{1,40}|[0-9]{1,3}(?:[, ][0-9]{3}){1,12})")
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
PLAIN = WIDE | str.maketrans("−‐‑₩\u00a0\u2009\u202f\u3000", "---￦    ")
NUMBER = re.compile(
    r"""(?P<sign>[+-]?)\ ?(?P<before>[$€£¥￦]?)\ ?
    (?: (?P<whole>[0-9]+)\ (?P<part>[0-9]+)/(?P<of>[0-9]+)
      | (?P<value>[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:\ [0-9]{3})+)
        (?: (?P<decimals>\.[0-9]*) | \ ?/\ ?(?P<divisor>[0-9]+(?:,[0-9]{3})*) )?
      | (?P<bare>\.[0-9]+) )
    \ ?(?P<unit>(?:[^\W\d_]|[%°$€£¥￦'])(?:[^\W\d_]|[%°/·. ]|\^?[23²³](?![0-9]))*)?""",
    re.VERBOSE,
)
TEXT = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")
LATEX = (  # spellings, and what they say
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)\b"), ""),
    (re.compile(r"\\[,;:! ]|~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\A\\frac\s*\{-([0-9]+)\}\s*\{([0-9]+)\}\Z"), r"-\1/\2"),
    (re.compile(r"(?<=[0-9])\s*\\frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}"), r" \1/\2"),  # mixed: 1\frac{1}{2}
    (re.compile(r"\\frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}"), r"\1/\2"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])"), r"\1/\2"),
    (re.compile(r"\\([%$])"), r"\1"),
)
WORDS = re.compile(r"(?<!\\)(?<![^\W\d_])[^\W\d_]{2,}")
FUNCTIONS = {"sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi"}


def final_answer(text: str) -> str | None:
    """The answer that a text settles on: the last <answer>...</answer>, else \\boxed{...}, else what follows ####.

    Reasoning does not count: only what comes after the last </think>, and before a <think> that comes after it. None
    when there is no answer, or the last one is not finished. Full-width digits and signs are given as plain ones.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    if "<answer>" in text:
        found = _tagged(text)
    elif "\\boxed" in text:
        found = _boxed(text)
    else:
        _, marked, after = text.rpartition("####")
        found = after.partition("\n")[0] if marked else None
    return None if found is None else found.translate(WIDE).strip()


def _tagged(text: str) -> str | None:
    start = text.rindex("<answer>") + len("<answer>")
    end = text.find("</answer>", start)
    return text[start:end] if end >= 0 else None


def _boxed(text: str) -> str | None:
    """Of the last \\boxed: what its braces hold, which may hold braces."""
    begun = re.compile(r"\\boxed\s*\{").match(text, text.rindex("\\boxed"))
    if not begun:
        return None
    depth = 1
    for brace in re.compile(r"\\?[{}]").finditer(text, begun.end(), begun.end() + 2 * LONGEST):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[begun.end() : brace.start()]
    return None


def answer_score(answer: int | str, text: str) -> float:
    """1 if the final answer of the text is equal to the reference, else 0."""
    given = final_answer(text)
    return float(given is not None and is_equal(str(answer), given))


def is_equal(answer: str, given: str) -> bool:
    """Whether an answer, alone, says the same as the reference."""
    if len(given) > LONGEST or len(answer) > LONGEST:
        return False
    answer, given = plain(answer), plain(given)
    expected = read_number(answer, blanks=False)  # "1 234" may be two numbers: in a reference it is no 1234
    if expected is not None:
        return read_number(given) == expected
    answer, given = tight(answer), tight(given)
    if TEXT.fullmatch(answer):
        answer, given = answer.casefold(), given.casefold()
    if answer == given:
        return bool(answer)
    return _is_formula(answer) and _could_be(answer, given) and bool(_formulas_equal(answer, given))


def read_number(text: str, blanks: bool = True) -> tuple[Fraction, str] | None:
    """A number alone and its unit ("" for none; % is no unit but a hundredth). None for anything else.

    blanks: whether a blank may stand between thousands.
    """
    found = NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if not found or (found["unit"] and found["before"]) or (not blanks and " " in (found["value"] or "")):
        return None
    if found["whole"]:
        part, of = int(found["part"]), int(found["of"])
        if not 0 < part < of:
            return None
        value = int(found["whole"]) + Fraction(part, of)
    else:
        digits = re.sub("[, ]", "", found["value"] or "0")
        value = Fraction(digits + (found["decimals"] or found["bare"] or ""))
        divisor = int((found["divisor"] or "1").replace(",", ""))
        if found["divisor"] and (divisor == 0 or (value / divisor).denominator == 1):
            return None  # 24/2 is a calculation left undone
        value /= divisor
    unit = (found["unit"] or found["before"]).strip().rstrip(".").replace("²", "^2").replace("³", "^3")
    if unit.startswith("%"):
        value, unit = value / 100, unit[1:].strip()
    return (-value if found["sign"] == "-" else value), unit


def as_integer(text: str) -> int | None:
    """A whole number, alone: full-width digits, and commas or blanks between thousands, are read too."""
    text = text.translate(PLAIN).strip()
    return int(re.sub("[, ]", "", text)) if INTEGER.fullmatch(text) else None


def integer_score(answer: int, text: str) -> float:
    """`answer_score` of a whole number."""
    return answer_score(answer, text)


def plain(text: str) -> str:
    """One spelling of the same characters and of the simpler LaTeX."""
    text = unicodedata.normalize("NFC", text).translate(PLAIN).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    for pattern, said in LATEX:
        text = pattern.sub(said, text)
    return " ".join(text.split()).removesuffix(".").removesuffix("。").rstrip()


def tight(text: str) -> str:
    """A blank separates two numbers or words of Latin letters; beside anything else it does not count. Nor does it in
    Korean, which writes compounds with it and without."""
    return re.sub(r"(?<![0-9A-Za-z+.-]) | (?![0-9A-Za-z+.-])", "", text)


# --- formulas, by math-verify -----------------------------------------------------------------------------------------


def _is_formula(answer: str) -> bool:
    """Not a word, a list of words or a time: something that has several right spellings."""
    signs = r"[a-zA-Z\\]", r"[\\^=+*/()0-9-]"
    return all(re.search(sign, answer) for sign in signs) and _words(answer) <= FUNCTIONS


def _could_be(answer: str, given: str) -> bool:
    """Of one piece, as the reference is, and as exact: math-verify takes what it likes from a list or a sentence, and
    compares decimals when they are rounded."""
    counts = [[text.count(sign) for sign in ".,;=\n"] for text in (answer, given)]
    return counts[0] == counts[1] and _words(given) <= FUNCTIONS and len(given) <= 2 * len(answer) + 80


def _words(text: str) -> set[str]:
    return set(WORDS.findall(text))


def _formulas_equal(answer: str, given: str) -> bool:
    worker = _formula_worker()
    return worker is not None and worker.call("is_equal", [[answer, given]], FORMULA_SECONDS)[0].value is True


@cache
def _formula_worker() -> Worker | None:
    """One for the process; None where the extra is not installed."""
    return Worker("twelve.tasks.formulas", "math-verify", memory=FORMULA_MEMORY) if find_spec("math_verify") else None
