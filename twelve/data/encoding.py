"""Bytes that should be UTF-8: what of them is, and what the others look like. Nothing is converted: a wrong guess is
worse than a line that says what to do."""

from __future__ import annotations

from pathlib import Path

from twelve.errors import InputError

NOISE = 0.3  # share of undecodable bytes and control characters above which a file is no text
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how such a file begins
COMMON = "이다는에의을가"  # syllables; one in twenty of Korean prose is one of them, at the least


def decode(data: bytes) -> tuple[str, int]:
    """Text, and the number of bytes that had to be left out of it."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "ignore")
        return text, len(data) - len(text.encode())


def no_text(path: Path, noise: float, data: bytes) -> InputError:
    """The error that says so, for a file of which the share `noise` cannot be read, some of it `data`."""
    told = f"{path}: {noise:.0%} of it cannot be read as UTF-8 text; "
    if found := looks_like(data):
        return InputError(f"{told}it looks like {found[0]}: convert it (iconv -f {found[1]} -t utf-8)")
    return InputError(told + "if it is text, convert it from its encoding (iconv -f ... -t utf-8), else leave it out")


def looks_like(data: bytes) -> tuple[str, str] | None:
    """Name of an encoding, for people and for iconv; only if the bytes decode as it and what comes out is Korean, or if
    they begin with the mark of UTF-16."""
    if data.startswith(UTF_16):
        return "UTF-16", "utf-16"
    for end in (len(data), -1):  # a piece may end inside a character
        try:
            text = data[:end].decode("cp949")
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if not character.isascii()]
        hangul = sum("가" <= character <= "힣" for character in foreign)
        common = sum(character in COMMON for character in foreign)
        if hangul >= 0.8 * len(foreign) and common >= 0.05 * len(foreign) > 0:
            return "CP949", "cp949"
    return None
