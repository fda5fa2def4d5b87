"""Text from tokens as they come: whole characters, and never a part of a stop string."""

import time
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.engine.detokenize import TextStream


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at the given places."""
    edges = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(edges)]


def run(pieces: list[bytes], stop=()) -> list[str]:
    stream = TextStream(pieces.__getitem__, stop)
    texts = []
    for token in range(len(pieces)):
        texts.append(stream.feed(token))
        if stream.stopped:
            break
    return [*texts, stream.flush()]


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(0, 60)))
def test_any_cutting_gives_the_text_and_whole_characters(text, cuts):
    texts = run(pieces_of(text.encode(), cuts))
    assert "".join(texts) == text
    assert all("�" not in part for part in texts) or "�" in text


@settings(deadline=None)
@given(st.binary(), st.lists(st.integers(0, 60)))
def test_bytes_that_are_no_text_come_out_as_replacements(data, cuts):
    assert "".join(run(pieces_of(data, cuts))) == data.decode(errors="replace")


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet="ab한", max_size=12), st.lists(st.text(alphabet="ab한", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30)),
)  # fmt: skip
def test_stop_strings_end_the_text_whatever_the_cutting(text, stop, cuts):
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(run(pieces_of(text.encode(), cuts), stop)) == expected


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    assert run([b"go <", b"/th", b"is>"], ["</think>"]) == ["go ", "", "</this>", ""]
    assert run([b"go <", b"/think", b">ing"], ["</think>"]) == ["go ", "", "", ""]
    assert run([b"go <", b"/thi"], ["</think>"]) == ["go ", "", "</thi"]


def test_korean_syllables_wait_for_their_last_byte():
    data = "열두".encode()
    assert run([data[:2], data[2:4], data[4:]]) == ["", "열", "두", ""]


def test_a_token_costs_the_same_late_as_early():
    stream = TextStream(lambda token: b"word ", ["never said"])

    def seconds(count):
        start = time.perf_counter()
        for _ in range(count):
            stream.feed(0)
        return time.perf_counter() - start

    seconds(1000)
    early = min(seconds(2000) for _ in range(5))
    seconds(100_000)
    assert min(seconds(2000) for _ in range(5)) < 5 * early
