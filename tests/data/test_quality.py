"""Languages, the rules of quality, and the hashes that they read from."""

import textwrap
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twelve.data import language, quality
from twelve.data.dedup import shingles
from twelve.data.language import LANGUAGES, languages
from twelve.data.words import BROKEN, DIGIT, HANGUL, LATIN, RARE, HashSet, read_words

SENTENCES = {  # a few of each, as people write them
    "ko": "아침 일찍 일어나 창문을 열었더니 밤새 눈이 내렸다. 아이들은 벌써 밖으로 나가 눈사람을 만들고 있다.",
    "en": "The children had already gone out when she opened the window and saw that it had snowed all night.",
    "fr": "Les enfants étaient déjà sortis quand elle ouvrit la fenêtre et vit qu'il avait neigé toute la nuit.",
    "de": "Die Kinder waren schon im Hof, als sie das Fenster öffnete und sah, dass es die Nacht geschneit hatte.",
    "es": "Los niños ya habían salido cuando ella abrió la ventana y vio que había nevado durante toda la noche.",
    "ja": "子供たちはもう庭に出ていて、彼女が窓を開けると、一晩中雪が降っていたことが分かった。",
    "zh": "她打开窗户的时候，孩子们已经跑到院子里去了，原来雪下了整整一夜，到处都是白色的。",
    "ru": "Дети уже выбежали во двор, когда она открыла окно и увидела, что всю ночь на село шёл снег.",
    "it": "I bambini erano già usciti quando lei aprì la finestra e vide che aveva nevicato per tutta la notte.",
    "nl": "De kinderen waren al naar buiten toen zij het raam opende en zag dat het de hele nacht had gesneeuwd.",
    "pt": "As crianças já tinham saído para o pátio quando ela abriu a janela e viu que nevara durante toda a noite.",
    "sv": "Barnen hade redan gått ut på gården när hon öppnade fönstret och såg att det hade snöat hela natten.",
    "tr": "Çocuklar çoktan çıkmıştı; pencereyi açınca bütün gece kar yağdığını ve her yerin beyaz olduğunu gördü.",
    "vi": "Bọn trẻ đã chạy ra sân khi cô mở cửa sổ và thấy rằng tuyết đã rơi suốt cả đêm, mọi thứ đều trắng xóa.",
}  # fmt: skip
KOREAN = (
    "강가의 작은 마을에는 오래된 나루터가 있었다. 사람들은 장날이 되면 배를 타고 강을 건너 읍내로 갔다.\n"
    "사공은 예순이 넘은 노인이었는데, 물살이 아무리 거세어도 한 번도 배를 놓친 적이 없다고 했다.\n"
    "어느 해 가을에 다리가 놓이자 나루터를 찾는 사람은 거의 없어졌다. 그래도 노인은 날마다 배를 손질했다.\n"
)
ENGLISH = (
    "There was an old ferry in the small village by the river. On market days people crossed to the town by boat.\n"
    "The ferryman was over sixty, and it was said that he had never lost a boat, however strong the current was.\n"
    "When a bridge was built one autumn, hardly anyone came to the ferry. Still, the old man mended it every day.\n"
)


def judge(*texts, wanted=(1, 2), talk=False):
    words = read_words(texts)
    told = languages(words)
    grams, first = shingles(words, told.code)
    return quality.judge(words, told, grams, first, np.full(len(texts), talk), wanted)


def reason(text, **given):
    return judge(text, **given).reasons[0]


# --- words ------------------------------------------------------------------------------------------------------------

ALPHABET = st.text(st.sampled_from("ab C한글é1 .,\n\u00a0\ufffd🙂"), max_size=40)


@settings(max_examples=80, deadline=None)
@given(st.lists(ALPHABET, min_size=1, max_size=6))
def test_words_are_those_of_a_plain_loop(texts):
    words = read_words(texts)
    plain = [("".join(c if c.isalnum() else " " for c in text.lower())).split() for text in texts]
    assert words.lengths.tolist() == [len(of) for of in plain]
    flat = [(number, word) for number, of in enumerate(plain) for word in of]
    assert words.text.tolist() == [number for number, _ in flat]
    spans = zip(words.starts, words.ends, strict=True)
    assert [words.slice(start, end) for start, end in spans] == [word for _, word in flat]
    same = {word: value for (_, word), value in zip(flat, words.hashes.tolist(), strict=True)}
    assert [same[word] for _, word in flat] == words.hashes.tolist() and len(set(same.values())) == len(same)
    for size in (1, 2, 3):
        grams = [tuple(of[at : at + size]) for of in plain for at in range(len(of))]
        values = dict(zip(grams, words.windows(size).tolist(), strict=True))
        assert [values[gram] for gram in grams] == words.windows(size).tolist()
        assert words.whole(size).tolist() == [len(gram) == size for gram in grams]


def test_a_hash_depends_on_the_words_and_nothing_around_them():
    one, other = read_words(["x y", "The  OLD, ferry!"]), read_words(["the old ferry"])
    assert (one.windows(3)[2], one.hashes[3]) == (other.windows(3)[0], other.hashes[1])
    assert len({int(read_words([text]).windows(2)[0]) for text in ("a b", "b a", "ab a", "a ba", "aa b")}) == 5
    composed, apart = (read_words([unicodedata.normalize(form, "한글 é")]) for form in ("NFC", "NFD"))
    assert (composed.hashes == apart.hashes).all()


def test_characters_are_counted_by_kind():
    counts = read_words(["Ab é 한글 12", "똠방 \ufffd\x01", ""]).counts
    assert counts[0, [LATIN, HANGUL, DIGIT]].tolist() == [3, 2, 2]
    assert counts[1, [RARE, HANGUL, BROKEN]].tolist() == [1, 1, 2] and counts[2].sum() == 0


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 2**64 - 1), max_size=50), st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_a_set_of_hashes(members, asked):
    asked += list(members)[:20]
    known = HashSet(np.array(sorted(members), np.uint64))
    at, entry = known.find(np.array(asked, np.uint64))
    assert at.tolist() == [place for place, value in enumerate(asked) if value in members]
    assert known.hashes[entry].tolist() == [asked[place] for place in at]


# --- languages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SENTENCES)
def test_languages_are_told(name):
    expected = name if name in ("ko", "en") else "other"
    assert [LANGUAGES[code] for code in languages(read_words([SENTENCES[name]])).code] == [expected]


def test_a_language_is_told_in_a_batch_as_alone_and_with_foreign_names():
    mixed = ["서울 Seoul(首爾)은 대한민국 Korea의 수도이다.", "The word 사랑 means love, and it is the title."]
    texts = [*SENTENCES.values(), *mixed, "", "12 34 -- 56"]
    together = languages(read_words(texts)).code
    assert together.tolist() == [languages(read_words([text])).code[0] for text in texts]
    assert [LANGUAGES[code] for code in together[-4:-2]] == ["ko", "en"]


def test_small_words_are_distinct_enough_to_tell():
    for name, words in language.SMALL_WORDS.items():
        assert len(set(words.split())) >= 13, name


# --- rules ------------------------------------------------------------------------------------------------------------


GOOD = [
    KOREAN, ENGLISH, SENTENCES["ko"], SENTENCES["en"], KOREAN + ENGLISH, "배가 떠난다. 바다로 나간다. 다시 온다.",
    ENGLISH + " Charlotte Brontë’s ferry and Beyoncé’s boat stopped at “The Paris Café” for an hour or two. " * 2,
    "좋은 아이디어를 얻으려면 오래 생각해야 한다. 모두의 아이디어를 모으면 해결책이 나온다. 쿠키를 먹으며 회의를 했다.",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_good_text_is_kept(text):
    judged = judge(text)
    assert judged.reasons == [""] and judged.scores[0] > 0.2


DIRT = {
    "short": ["", "!", "한 마디", "two words", "1 2 3"],
    "broken": [
        KOREAN.encode().decode("latin-1"), KOREAN.encode().decode("cp1252", "replace"),
        KOREAN.encode().decode("cp949", "replace"), KOREAN.encode("cp949").decode("latin-1"),
        "“It’s — naïve,” she said, “and it’s over.” ".encode().decode("cp1252", "replace") + ENGLISH,
        KOREAN.replace("나", "\ufffd"), ENGLISH.replace("r", "r\x00"), ENGLISH.replace(" ", "\ue000 "),
    ],
    "language": [SENTENCES["fr"], SENTENCES["ja"], SENTENCES["ru"] * 3],
    "noise": [
        "0.12 3.45 6.78 9.01 2.34 5.67\n" * 20 + "table of values for the end of the year and more",
        "<div class=\"a\"><span>{{x}}</span></div> [[link|of]] == it ==\n" * 12 + ENGLISH,
        " ".join(f"the{'abcdefghij' * 3}{n}" for n in range(40)) + " of the and to in",
        "#ship #sea #the #old #river #boat #town #of #and #market #people #day #bridge #was #in",
    ],
    "list": [
        "harbour boats sailing river ferry bridge market town village autumn current people " * 2 + "ships",
        "나루터 사공 강가 마을 장날 읍내 다리 가을 노인 물살 뱃길 포구 어부 그물 돛단배 등대 항구 부두 갯벌 조수",
        "\n".join(["Home", "Our boats", "The river", "News of it", "Prices", "To the top", "Of the day", "So on"] * 4),
    ],
    "boilerplate": [
        "We use cookies to give you the best experience. Read our privacy policy and terms of use. Log in or sign up.",
        "로그인 후 이용하실 수 있습니다. 개인정보처리방침과 이용약관에 동의해 주세요. 무단 전재와 재배포 금지.",
    ],
    "repetition": [ENGLISH.splitlines()[0] + ("\n" + ENGLISH.splitlines()[1]) * 9, KOREAN.split(".")[0] * 12 + "."],
}  # fmt: skip


@pytest.mark.parametrize(("expected", "text"), [(name, text) for name, texts in DIRT.items() for text in texts])
def test_dirt_is_dropped_for_its_reason(expected, text):
    assert reason(text) == expected


@pytest.mark.parametrize("text", [ENGLISH, KOREAN])
@pytest.mark.parametrize(("width", "end"), [(72, "\n"), (50, "\r\n")])
def test_text_may_be_wrapped_at_a_column(text, width, end):
    wrapped = (2 * end).join(end.join(textwrap.wrap(line, width)) for line in text.splitlines())
    assert judge(wrapped).scores[0] > 0.9
    if text is ENGLISH:  # no line, however long, ends a sentence; in Korean its last word may
        assert judge(wrapped.replace(".", "")).reasons == ["list"]


def test_a_list_of_long_lines_is_one():
    heads = [f"The old ferry of {place} and what the town made of it" for place in ("Aru", "Bel", "Cos", "Dun", "Eda")]
    assert reason("\n".join(heads)) == "list" and reason("\n\n".join(heads)) == "list"


def test_korean_says_as_much_in_fewer_words_a_line():
    story = ["배가 안개 속으로 떠났다.", "노인은 말이 없었다.", "“언제 오나?”", "아이가 다시 물었다."]
    assert judge("\n\n".join(story)).reasons == [""]
    assert reason("\n\n".join(word for line in story for word in line.split())) == "list"


def test_sentences_end_before_quotes_and_in_korean_with_a_line():
    diary = "아침부터 비가 왔어요\n그래서 책을 읽었다.\n친구가 왔다\n떡볶이를 만들까 말까 하다가\n\n내일은 무엇을 할까"
    speech = '"Shall we go?" (He would not.) "No!" said the ferryman, 3.5 miles away.\nvillage\n“Then wait.”'
    assert quality._stops(read_words([diary, speech, KOREAN * 9])).tolist()[:2] == [4, 5]


def test_the_first_reason_says_what_was_measured():
    judged = judge(KOREAN.encode().decode("latin-1"), SENTENCES["fr"], ENGLISH)
    assert judged.details[0].startswith("broken characters 1") and judged.details[1:] == ["other", ""]
    assert judged.scores[0] == 0 and judged.scores[2] == 1


def test_wanted_languages():
    assert reason(SENTENCES["fr"], wanted=(0,)) == "" and reason(ENGLISH, wanted=(0, 1)) == "language"


def test_talk_is_held_to_few_rules():
    for text in ("네!", SENTENCES["fr"], "ok " * 30):
        assert reason(text, talk=True) == ""
    assert reason(KOREAN.encode().decode("latin-1"), talk=True) == "broken"


def test_a_text_is_judged_in_a_batch_as_alone():
    texts = [text for texts in DIRT.values() for text in texts] + [KOREAN, ENGLISH, *SENTENCES.values()]
    together = judge(*texts)
    alone = [judge(text) for text in texts]
    assert together.reasons == [one.reasons[0] for one in alone]
    assert together.scores.tolist() == [one.scores[0] for one in alone]


def test_every_reason_has_a_meaning():
    assert {rule.reason for rule in quality.RULES} <= quality.MEANING.keys()
    assert all(rule.good != rule.bad for rule in quality.RULES)
