"""Values of the command line: each reads a text, or says in one line what it should have been."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from twelve.errors import InputError

MOST = 1e18  # that is written out as a number of bytes or things


def _number(kind: type, accepts: Callable[[float], bool], wanted: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if math.inf > abs(value) > MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is too large a number")
        if not (abs(value) <= MOST and accepts(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


positive = _number(int, lambda value: value >= 1, "a whole number from 1 on")
natural = _number(int, lambda value: value >= 0, "a whole number from 0 on")
port = _number(int, lambda value: 0 <= value <= 65535, "a port from 0 to 65535")
positive_float = _number(float, lambda value: value > 0, "a number above 0")
not_negative = _number(float, lambda value: value >= 0, "a number from 0 on")

share = _number(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")


def size(text: str) -> int:
    """Bytes, written like 512MiB, 8GiB, 8GB or 1000000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if not found or not 0 < float(found[1]) < MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it like 512MiB or 8GiB")
    power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def amount(text: str) -> float:
    """A number, written like 350M, 7B or 14.8T."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMBT]?)", text.strip(), re.IGNORECASE)
    if not found or not 0 < float(found[1]) < MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number like 350M, 7B or 14.8T")
    return float(found[1]) * 1000 ** " KMBT".index(found[2].upper() or " ")


def budget(text: str) -> int | float:
    """A share of what there is (float), written like 25%, or bytes (int) as in `size`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip())
    if not found:
        return size(text)
    if not 0 < float(found[1]) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: write it like 25%")
    return float(found[1]) / 100


def weight(text: str) -> tuple[str, float]:
    """PATH=NUMBER."""
    path, equals, number = text.rpartition("=")
    if not (path and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PATH=NUMBER")
    return path, not_negative(number)


def numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, like 6,4,2."""
    return [positive(part) for part in text.split(",")]


def naturals(text: str) -> list[int]:
    """Whole numbers from 0 on, like 1,3."""
    return [natural(part) for part in text.split(",")]


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def switch(text: str) -> bool:
    """on or off."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


def finer(given: Iterable[tuple[str, str]], readers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The values of several assignments. InputError for a name without a reader, or a value that it refuses."""
    values = {}
    for name, text in given:
        if name not in readers:
            raise InputError(f"--set {name}: there is no such setting, only {', '.join(readers)}")
        try:
            values[name] = readers[name](text)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--set {name}: {error}") from None
    return values


def device(text: str) -> str:
    from twelve.train.precision import pick_device

    try:
        pick_device(text)
    except InputError as error:  # a ValueError, which argparse would put in words of its own
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
