"""Korean particles, which depend on how the word before them ends when it is read aloud."""

from __future__ import annotations

import re

# final consonants in the order of Unicode's Hangul syllables, 28 to a vowel
FINALS = ("", *"ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ")
DIGITS = "영일이삼사오육칠팔구"
SMALL_UNITS = "십백천"
LARGE_UNITS = "만억조경"  # of four digits each
UNITS = {
    "mm": "밀리미터", "cm": "센티미터", "m": "미터", "km": "킬로미터", "mg": "밀리그램", "g": "그램",
    "kg": "킬로그램", "t": "톤", "mL": "밀리리터", "L": "리터",
}  # fmt: skip
LETTERS = {"l": "엘", "m": "엠", "n": "엔", "r": "알"}  # the names of all others end in a vowel


def final_consonant(word: str) -> str:
    """The consonant that ends the word when read aloud, "" for a vowel.

    Digits are read in Sino-Korean (10 is 십), the units of UNITS in full (kg is 킬로그램), single letters and capitals
    by their names (N is 엔); what else is not Hangul counts as a vowel.
    """
    last = word[-1:]
    if last.isascii() and last.isdigit():
        last = _last_syllable_of_number(word)
    elif last.isascii() and last.isalpha():
        last = _last_syllable_of_letters(word)
    return FINALS[(ord(last) - 0xAC00) % 28] if "가" <= last <= "힣" else ""


def with_particle(word: str, pair: str) -> str:
    """The word and the form of the particle that fits it, of a pair like "은/는": after a consonant, after a vowel."""
    after_consonant, after_vowel = pair.split("/")
    final = final_consonant(word)
    if after_consonant.startswith("으"):  # 으로, 으로서, 으로써: ㄹ counts as a vowel here
        final = final.replace("ㄹ", "")
    return word + (after_consonant if final else after_vowel)


class Noun(str):
    """Text that takes its particle in a format string: f"{Noun('사과'):은/는}" is 사과는."""

    def __format__(self, pair: str) -> str:
        return with_particle(self, pair) if pair else str(self)


def _last_syllable_of_number(word: str) -> str:
    """Of the digits that end the word: 7 is 칠, 20 이십, 300 삼백, 40000 사만, 0 영; decimals go digit by digit."""
    digits = word[len(word.rstrip("0123456789,")) :].replace(",", "")
    is_decimal = word.removesuffix(digits)[-2:-1].isdigit() and word.removesuffix(digits).endswith(".")
    zeros = len(digits) - len(digits.rstrip("0"))
    if is_decimal or zeros in (0, len(digits)):
        return DIGITS[int(digits[-1])]
    if zeros < 4:
        return SMALL_UNITS[zeros - 1]
    return LARGE_UNITS[min(zeros // 4, len(LARGE_UNITS)) - 1]


def _last_syllable_of_letters(word: str) -> str:
    """Of the Latin letters that end the word. One letter is a unit only after a number: 5m is 오 미터, m is 엠."""
    letters = re.search("[A-Za-z]+$", word)[0]
    before = word.removesuffix(letters).rstrip()
    if letters in UNITS and (len(letters) > 1 or before[-1:].isdigit()):
        return UNITS[letters][-1]
    return LETTERS.get(letters[-1].lower(), "") if len(letters) == 1 or letters.isupper() else ""
