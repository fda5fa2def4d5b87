"""What is wrong with a text, if anything, and how good it is otherwise: for Korean and English, from counts alone.

Every rule looks at one measure, which is good up to one value and bad from another on, in between by degrees. A text
that is bad in one of them is dropped for it; the product over all is its score. The measures follow Gopher's rules (Rae
and others 2021, appendix A) and C4's (Raffel and others 2020), which were made for English pages; those for Korean
count particles and endings in place of small words, and syllables that no Korean word has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from twelve.data.language import EN, KO, LANGUAGES, Told
from twelve.data.words import (
    BROKEN,
    DIGIT,
    HANGUL,
    LATIN,
    LETTER,
    LINE,
    MARKUP,
    PUNCTUATION,
    RARE,
    SPACE,
    HashSet,
    Words,
    mix,
    read_words,
)

SHORT = "short"
LANGUAGE = "language"
BROKEN_TEXT = "broken"
MEANING = {  # of the reasons why a text is dropped
    SHORT: "hardly any words",
    BROKEN_TEXT: "read in a wrong encoding, or full of characters that no one wrote",
    LANGUAGE: "in another language",
    "noise": "more digits, symbols or markup than a text has",
    "list": "keywords, menus or tables: no sentences",
    "boilerplate": "what web pages say beside their text",
    "repetition": "says the same again and again",
    "contaminated": "has words in common with a file for evaluation",
    "duplicate": "the same text as an earlier document",
    "near duplicate": "almost the same as an earlier document",
    "budget": "good enough, but others say more",
}
LEAST_WORDS, LEAST_LETTERS = 5, 30  # of a text; one without blanks has few words
LEAST_SCORE = 0.03  # of a text that is nearly bad in several ways


@dataclass(frozen=True)
class Rule:
    """A measure that is `good` up to there and `bad` from there on; bad may be the lower of the two."""

    reason: str
    measure: str
    good: float
    bad: float
    language: int | None = None  # only of this one


RULES = (
    Rule(BROKEN_TEXT, "broken characters", 0.0, 0.005),
    Rule("noise", "letters", 0.8, 0.5),
    Rule("noise", "markup", 0.02, 0.1),
    Rule("noise", "letters a word", 6.0, 12.0, EN),
    Rule("noise", "letters a word", 3.8, 8.0, KO),
    Rule("noise", "marks a word", 0.4, 0.85),
    Rule("list", "small words", 0.3, 0.08, EN),
    Rule("list", "endings", 0.5, 0.15, KO),
    Rule("list", "prose", 0.7, 0.1),
    Rule("list", "words a line", 7.0, 3.0, EN),
    Rule("list", "words a line", 4.2, 1.8, KO),
    Rule("list", "words a sentence", 60.0, 130.0, EN),
    Rule("list", "words a sentence", 35.0, 90.0, KO),
    Rule("boilerplate", "boilerplate", 0.01, 0.1),
    Rule("repetition", "repeated lines", 0.05, 0.3),
    Rule("repetition", "repeated n-grams", 0.1, 0.4),
)

# what follows a lead byte of UTF-8 that was read as Latin-1 or Windows-1252
FOLLOWERS = "".join(map(chr, range(0x80, 0xC0))) + "€‚ƒ„…†‡ˆ‰‹‘’“”•–—˜™›"
SHORT_LEADS = [0xE2, 0xE3, 0xF0, 0xF1]  # of two bytes, in lower case; after others, as in café”, it takes two followers
STOPS = ".!?…。！？"  # before a blank
CLOSING = "\"'”’」』)）"  # may come between
KOREAN_ENDS = "다요까죠"  # of a line without a stop
LINE_ENDS = STOPS + CLOSING + KOREAN_ENDS + ":;"
LONG_LINE = 100  # characters, that make a line prose whatever it ends with
WRAPPED = 30  # characters, from which on a line may be the beginning of the next, as in text with a fixed width
ENDINGS = "은는이가을를에의로와과도만다고며서지면게요음기한할된인던들나라해여어아까야죠든련적히록려진운일니"
BOILERPLATE = (
    "accept all", "accept cookies", "cookie policy", "cookie settings", "privacy policy", "terms of service",
    "terms of use", "terms and conditions", "all rights reserved", "sign up", "sign in", "log in", "log out",
    "your account", "my account", "an account", "forgot password", "your password", "newsletter", "subscribe",
    "click here", "read more", "learn more", "add to cart", "shopping cart", "free shipping", "contact us", "about us",
    "site map", "skip to content", "main content", "share this", "follow us", "powered by", "back to top",
    "your browser", "javascript", "manage preferences", "related posts", "leave a comment", "email address", "view all",
    "main menu", "toggle navigation", "lorem ipsum", "page not found", "customer service", "faq", "login", "logout",
    "sitemap", "wishlist",
)  # fmt: skip
KOREAN_BOILERPLATE = (  # what words begin with, whatever particles follow
    "로그인", "로그아웃", "회원가입", "이용약관", "개인정보", "무단", "재배포", "저작권자", "고객센터",
    "장바구니", "사이트맵", "구독하", "댓글", "사업자등록", "통신판매업", "비밀번호", "마이페이지",
    "전체메뉴", "바로가기", "더보기", "공유하기", "공지사항", "뉴스레터", "링크", "클릭", "목록으로", "맨위로",
    "주문배송", "배송조회", "문의하기", "회사소개", "카카오톡", "페이스북", "트위터",
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Of D texts: the reason to drop each ("" for none), what was measured for it, and a score from 0 to 1."""

    reasons: list[str]
    details: list[str]
    scores: np.ndarray  # [D] float32


def judge(
    words: Words, told: Told, grams: np.ndarray, first: np.ndarray, talk: np.ndarray, wanted: Sequence[int]
) -> Judged:
    """Hold every rule against every text; the first that it breaks is the reason to drop it.

    `told` is of `languages`, `grams` and `first` are the texts' `shingles`, `talk` [D] says which of them are
    conversations, and `wanted` are the languages to keep.
    """
    measured = measure(words, told, grams, first)
    language = told.code
    scores, worst = np.ones(words.texts), np.ones(words.texts)
    reasons, details = [""] * words.texts, [""] * words.texts

    def drop(which: np.ndarray, reason: str, detail: Callable[[int], str]) -> None:
        for text in np.flatnonzero(which).tolist():
            if not reasons[text]:
                reasons[text], details[text] = reason, detail(text)

    letters = words.counts[:, LATIN : LETTER + 1].sum(1)
    short = (words.lengths < LEAST_WORDS) & (letters < LEAST_LETTERS)
    drop(short & ~talk, SHORT, lambda text: f"{words.lengths[text]} words")
    worst_rule = np.zeros(words.texts, np.int64)
    for number, rule in enumerate(RULES):
        value = measured[rule.measure]
        good = np.clip((value - rule.bad) / (rule.good - rule.bad), 0, 1)
        applies = np.ones(words.texts, bool) if rule.language is None else language == rule.language
        applies = applies if rule.reason == BROKEN_TEXT else applies & ~talk
        good = np.where(applies, good, 1.0)
        scores *= good
        worst_rule[good < worst] = number
        worst = np.minimum(worst, good)
        drop(good == 0, rule.reason, lambda text, of=rule.measure, v=value: f"{of} {v[text]:.3g}")
        if rule.reason == BROKEN_TEXT:  # after it: what is broken has no language
            drop(~np.isin(language, wanted) & ~talk, LANGUAGE, lambda text: LANGUAGES[language[text]])
    for text in np.flatnonzero((scores < LEAST_SCORE) & ~talk).tolist():
        if not reasons[text]:
            rule = RULES[worst_rule[text]]
            reasons[text], details[text] = rule.reason, f"{rule.measure} {measured[rule.measure][text]:.3g}, and more"
    return Judged(reasons, details, scores.astype(np.float32))


def measure(words: Words, told: Told, grams: np.ndarray, first: np.ndarray) -> dict[str, np.ndarray]:
    """What the rules look at: [D] each, shares or numbers a word, line or sentence."""
    counts = words.counts
    written = np.maximum(1, counts.sum(1) - counts[:, SPACE] - counts[:, LINE])
    lengths = np.maximum(1, words.lengths)
    letters = counts[:, LATIN : LETTER + 1].sum(1)
    return {
        "broken characters": np.minimum(1.0, _broken(words) / written),
        "letters": letters / written,
        "markup": counts[:, MARKUP] / written,
        "marks a word": counts[:, PUNCTUATION : MARKUP + 1].sum(1) / lengths,
        "letters a word": (letters + counts[:, DIGIT]) / lengths,
        "small words": told.english / lengths,
        "endings": _endings(words) / np.maximum(1, _korean_words(words)),
        "words a sentence": words.lengths / (_stops(words) + 1),
        "boilerplate": _boilerplate(words) / lengths,
        "repeated n-grams": _repeated(grams, first),
        **_lines(words),
    }


def _broken(words: Words) -> np.ndarray:
    """Characters that no one wrote: [D]."""
    counts = words.counts
    kinds, points = words.kinds, words.points
    leads = np.flatnonzero((points >= 0xC2) & (points < 0xF5) & (kinds == LATIN))
    follows = _member_table(FOLLOWERS)[np.minimum(points, 0xFFFF)]  # a line feed follows every text
    second = np.isin(points[leads], SHORT_LEADS) | follows[np.minimum(leads + 2, len(points) - 1)]
    leads = leads[follows[leads + 1] & second]
    pairs = np.bincount(np.searchsorted(words.edges, leads, side="right") - 1, minlength=words.texts)
    hangul = counts[:, HANGUL] + counts[:, RARE]
    rare = np.where(counts[:, RARE] > 0.02 * hangul, counts[:, RARE], 0)  # a few are names, or someone's slang
    return counts[:, BROKEN] + 2 * pairs + rare


def _korean_words(words: Words) -> np.ndarray:
    last = words.kinds[words.ends - 1]
    return words.total(last == HANGUL)


def _endings(words: Words) -> np.ndarray:
    """Korean words that end in a particle or in the ending of a verb: [D]. Those of one syllable are no evidence."""
    last = words.points[words.ends - 1]
    known = _member_table(ENDINGS)[np.minimum(last, 0xFFFF)] & (words.ends - words.starts > 1)
    return words.total(known)


def _stops(words: Words) -> np.ndarray:
    """Ends of sentences: [D]."""
    stops = np.flatnonzero(_member_table(STOPS)[np.minimum(words.points, 0xFFFF)])
    after, closing = stops + 1, _member_table(CLOSING)  # a line feed follows every text
    for _ in range(2):
        after = after + closing[np.minimum(words.points[after], 0xFFFF)]
    lines = np.flatnonzero(words.kinds == LINE)
    lines = lines[(lines > 0) & _member_table(KOREAN_ENDS)[np.minimum(words.points[lines - 1], 0xFFFF)]]
    stops = np.concatenate([stops[words.kinds[after] <= LINE], lines])
    return np.bincount(np.searchsorted(words.edges, stops, side="right") - 1, minlength=words.texts)


def _boilerplate(words: Words) -> np.ndarray:
    """Words in phrases of web pages: [D]."""
    begins, phrases = _phrase_sets()
    at, _ = begins.find(words.hashes)
    found = np.zeros(words.texts)
    for size, known in phrases.items():
        hits, _ = known.find(words.windows(size, at))
        found += size * np.bincount(words.text[at[hits]], minlength=words.texts)
    korean = np.flatnonzero(words.kinds[words.starts] == HANGUL)
    for size, known in _korean_phrase_sets().items():
        ends = words.starts[korean] + size
        fits = ends <= words.ends[korean]
        hits, _ = known.find(words.spans(words.starts[korean][fits], ends[fits]))
        found += np.bincount(words.text[korean[fits][hits]], minlength=words.texts)
    return found


def _lines(words: Words) -> dict[str, np.ndarray]:
    """Of each text, the shares of its characters that are in lines of prose, and in lines that came before, and words a
    line that is not blank: [D]."""
    ends = np.flatnonzero(words.kinds == LINE)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts
    text = np.searchsorted(words.edges, ends, side="right") - 1
    total = np.maximum(1, np.bincount(text, sizes, minlength=words.texts))
    last = np.maximum(ends - 1, 0)
    for _ in range(2):  # blanks at the end
        last = np.maximum(np.where(words.kinds[last] == SPACE, last - 1, last), 0)
    filled = np.diff(np.cumsum(words.kinds > LINE)[ends], prepend=0) > 0
    ended = _member_table(LINE_ENDS)[np.minimum(words.points[last], 0xFFFF)] | (sizes >= LONG_LINE)
    goes_on = ~ended & (sizes >= WRAPPED) & np.append(filled[1:] & (text[1:] == text[:-1]), False)
    final = np.flatnonzero(~goes_on)  # a wrapped sentence is prose if its last line is
    prose = ended[final[np.searchsorted(final, np.arange(len(ends)))]]
    keys = words.spans(starts, ends) ^ mix(text.astype(np.uint64))  # a line is known within its text only
    order = np.argsort(keys, kind="stable")
    again = np.zeros(len(keys), bool)
    again[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return {
        "prose": np.bincount(text, sizes * prose, minlength=words.texts) / total,
        "repeated lines": np.bincount(text, sizes * again, minlength=words.texts) / total,
        "words a line": words.lengths / np.maximum(1, np.bincount(text, filled, minlength=words.texts)),
    }


def _repeated(grams: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The share of a text's n-grams that it had before: [D]."""
    counts = np.diff(first)
    text = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    keys = np.sort((grams >> np.uint64(16)) | (text << np.uint64(48)))
    again = keys[1:] == keys[:-1]
    repeats = np.bincount((keys[1:][again] >> np.uint64(48)).astype(np.int64), minlength=len(counts))
    return repeats / np.maximum(1, counts)


@cache
def _member_table(characters: str) -> np.ndarray:
    """[0x10000] bool: whether a code point is one of them; 0xFFFF, which stands for all above, is none."""
    table = np.zeros(0x10000, bool)
    table[[ord(character) for character in characters]] = True
    return table


@cache
def _phrase_sets() -> tuple[HashSet, dict[int, HashSet]]:
    """The words that phrases begin with, and the phrases by their number of words."""
    begins, by_size = [], {}
    for phrase in BOILERPLATE:
        words = read_words([phrase])
        size = len(words.hashes)
        begins.append(words.hashes[0])
        by_size.setdefault(size, []).append(words.windows(size)[0])
    return HashSet(np.array(begins)), {size: HashSet(np.array(hashes)) for size, hashes in by_size.items()}


@cache
def _korean_phrase_sets() -> dict[int, HashSet]:
    """By their number of syllables; none begins another."""
    by_size: dict[int, list] = {}
    for phrase in KOREAN_BOILERPLATE:
        by_size.setdefault(len(phrase), []).append(read_words([phrase]).hashes[0])
    return {size: HashSet(np.array(hashes)) for size, hashes in by_size.items()}
