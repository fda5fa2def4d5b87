"""Which tokens share an id: words but for case, accents and blanks; Hangul is neither merged nor taken apart."""

import unicodedata
from itertools import product

import numpy as np
import pytest

from twelve.data.tokenizer import CONTROL, Tokenizer
from twelve.model.compression import compress, normalise

SYLLABLES = [chr(code) for code in range(0xAC00, 0xD7A4)]
LETTERS = [chr(code) for code in range(0x3131, 0x318F)]  # that stand alone
KOREAN = "이순신은 조선의 장군이다. 각 갂 갃 간 값 앉아 ㄱㅏ ㅋㅋㅋ ㅠㅠ 배가 열두 척 남아 있습니다. 닦 많 "
ENGLISH = "The the THE ship Ship sails at dawn; naïve café cafe Cafe. It was 12 ships, twelve SHIPS. "


@pytest.mark.parametrize(
    "text, normal",
    [("The", "the"), (" the", "the"), ("Café", "cafe"), ("CAFE\u0301", "cafe"), ("ＡＢＣ１", "abc1"), ("ﬁ", "fi"),
     (" ", " "), ("\n\t ", " "), ("a \n b", "a b"), ("\u3000", " "), ("İ", "i"), ("½", "1⁄2"), ("", "")],
)  # fmt: skip
def test_normal_forms(text, normal):
    assert normalise(text) == normal


def test_no_two_syllables_or_letters_merge():
    forms = {normalise(text) for text in SYLLABLES + LETTERS}
    assert len(SYLLABLES) == 11172 and len(forms) == len(SYLLABLES) + len(LETTERS)
    # nor a syllable with what follows it: final consonants are not the next syllable's first
    some = [*"가각갂갃간값까닭아안앉많", *"ㄱㄳㅏㅐㅎ"]
    pairs = {normalise("".join(pair)) for pair in product(some, repeat=2)}
    assert len(pairs) == len(some) ** 2 and not pairs & {normalise(one) for one in SYLLABLES}


def test_hangul_comes_back_whole():
    text = "".join(SYLLABLES) + "".join(LETTERS)
    assert unicodedata.normalize("NFC", normalise(text)) == text


@pytest.mark.parametrize("syllable", "가각힣뷁")
def test_the_same_syllable_in_letters_that_conjoin_is_the_same(syllable):
    assert normalise(unicodedata.normalize("NFD", syllable)) == normalise(syllable)


def test_half_width_letters_are_the_same_letters():
    narrow = [chr(code) for code in range(0xFFA1, 0xFFDD) if unicodedata.decomposition(chr(code))]
    wide = {normalise(letter) for letter in narrow}
    assert wide == {letter for letter in LETTERS if letter < "\u3164"} and len(wide) == len(narrow) == 51
    assert normalise("ﾡￂ") == "ㄱㅏ" != normalise("가")


@pytest.fixture(scope="module")
def bilingual() -> Tokenizer:
    return Tokenizer.train([KOREAN, ENGLISH] * 8, vocab_size=500)


def test_tokens_merge_exactly_when_their_normal_forms_are_equal(bilingual):
    ids = compress(bilingual)
    assert ids.shape == (bilingual.vocab_size,) and ids.dtype == np.int32
    first = np.unique(ids, return_index=True)[1]
    assert (np.diff(first) > 0).all() and ids.max() + 1 == len(first) < bilingual.vocab_size  # order of appearance
    control = {bilingual.id_of(token) for token in CONTROL}
    alone = {}
    for token in range(bilingual.vocab_size):
        try:
            text = bilingual.decode_bytes([token]).decode()
        except UnicodeDecodeError:
            text = None
        if token in control or text is None or not normalise(text):
            alone[token] = ids[token]
        others = np.flatnonzero(ids == ids[token])
        if token in alone:
            assert len(others) == 1
            continue
        assert {normalise(bilingual.decode_bytes([other]).decode()) for other in others} == {normalise(text)}
    assert len(alone) > 128  # the bytes above 0x7f at least

    def compressed(text):
        return [ids[token] for token in bilingual.encode(text)]

    assert compressed("Q") == compressed("q") != compressed("k")


def test_korean_words_keep_their_ids_apart(bilingual):
    ids = compress(bilingual)
    hangul = {}
    for token in range(bilingual.vocab_size):
        text = bilingual.decode_bytes([token]).decode(errors="replace").strip()
        if any("가" <= character <= "힣" for character in text) and "\ufffd" not in text:
            hangul.setdefault(ids[token], set()).add(text)
    assert len(hangul) > 10 and all(len(texts) == 1 for texts in hangul.values())  # but for the blank in front


def test_ids_that_are_no_tokens_stay_apart():
    class Holes:
        vocab_size, control_tokens = 5, frozenset({"<end>"})

        def id_of(self, token):
            return 0

        def decode_bytes(self, ids):
            return [b"<end>", b"A", b"", b"", b" a"][ids[0]]

    assert compress(Holes()).tolist() == [0, 1, 2, 3, 1]
