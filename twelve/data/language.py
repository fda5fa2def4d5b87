"""Korean, English or another language: by script, and among Latin ones by the small words that a language cannot do
without. A table of a few hundred of them is all it knows, so it tells what it was made to tell: is this Korean, is this
English."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from twelve.data.words import DIGIT, HAN, HANGUL, KANA, LATIN, LETTER, RARE, HashSet, Words, read_words

LANGUAGES = ("other", "ko", "en")
OTHER, KO, EN = range(3)
SYLLABLE = 2.5  # letters of an alphabet that say as much as a syllable of Hangul or a Chinese character
KOREAN_SHARE = 0.4  # of what is written, that makes a text Korean: it quotes more English than the other way round
LEAST = 0.05  # share of small words that any prose has more of
ACCENTS = 0.01  # share of letters that English has fewer of

SMALL_WORDS = {
    "en": "the of and to in a is was for as on with by that it at from his he were are which this be an or had not but "
    "also have has its their they who been after one two when first her she all more other may most such into than "
    "during these between over between would where there will about up out only some can could him them then said "
    "you your my we our what if no so do did how any each both because while since under until against within many",
    "fr": "le la les des du et est une un dans pour que qui sur avec au aux par pas ne se ce il elle sont plus été en "
    "de cette ses mais ou où leur comme fait nous vous on",
    "de": "der die das und ist von den dem zu mit auf für nicht ein eine im des sich auch als es wurde werden einer "
    "bei nach aus wird sind an am zum zur oder aber wie dass war in er sie",
    "es": "el la los las de del que en y un una por con para su se es al lo como más fue sus o este entre pero sobre "
    "también hasta desde no ha muy",
    "it": "il di che e la per un in con del della non una sono le dei nel alla i da è si al anche come più gli questo "
    "ma delle lo ha",
    "pt": "o a os as de do da que e em um uma para com não no na por mais dos das ao se foi como seu sua é são pela "
    "pelo também",
    "nl": "de het een van en in is dat op te zijn voor met niet aan er die ook door bij werd naar om uit dan maar als "
    "wordt",
    "sv": "och att det som en på är av för den till med har inte om ett han var jag men vi från i og på af til der "
    "ikke være",
    "pl": "w i na z się do nie że jest to od po jak przez dla za oraz był są o a ale je v se že na který byl jako",
    "tr": "ve bir bu için ile olarak daha çok gibi olan en sonra kadar ancak da de ise var",
    "id": "yang dan di dari untuk dengan ini pada adalah itu dalam tidak ke oleh sebagai juga akan",
    "la": "et in est non ad cum ut sed ex quod qui sunt ab atque nec per",
}


@dataclass(frozen=True)
class Told:
    """Of D texts."""

    code: np.ndarray  # [D] uint8: the place of the language in LANGUAGES
    english: np.ndarray  # [D]: English small words


def languages(words: Words) -> Told:
    """The language of each text."""
    counts = words.counts
    hangul = SYLLABLE * (counts[:, HANGUL] + counts[:, RARE])
    chinese = SYLLABLE * (counts[:, HAN] + counts[:, KANA])
    latin = counts[:, LATIN]
    written = np.maximum(1, hangul + chinese + latin + counts[:, LETTER])
    korean = (hangul >= KOREAN_SHARE * written) & (hangul > chinese)
    english, foreign = _small_words(words)
    least = LEAST * words.total(words.kinds[words.starts] != DIGIT)
    accents = np.flatnonzero((words.kinds == LATIN) & (words.points > 0x7F))
    accents = np.bincount(np.searchsorted(words.edges, accents, side="right") - 1, minlength=words.texts)
    # a list of names or keywords is in no language: it goes as English where nothing speaks against that
    nothing_else = (foreign <= least) & (accents <= ACCENTS * latin)
    is_english = ~korean & (latin >= 0.5 * written) & np.where(english > least, english > foreign, nothing_else)
    return Told(np.where(korean, KO, np.where(is_english, EN, OTHER)).astype(np.uint8), english)


def _small_words(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """[D], [D]: words in English's list, and in that of the other language which has most of them."""
    known, members = _table()
    at, entry = known.find(words.hashes)
    text = words.text[at]
    counts = [np.bincount(text[column[entry]], minlength=words.texts) for column in members]
    return counts[0], np.max(counts[1:], axis=0)


@cache
def _table() -> tuple[HashSet, np.ndarray]:
    """All small words, and [language, entry] whether it is one of its."""
    lists = [set(read_words([text]).hashes.tolist()) for text in SMALL_WORDS.values()]
    known = HashSet(np.array(list(set().union(*lists)), np.uint64))
    return known, np.array([[entry in words for entry in known.hashes.tolist()] for words in lists])
