"""The tokenizer: lossless, the same for transformers, and robust against the folders of others."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twelve.data.sample import sample
from twelve.data.tokenizer import CONTROL, MIN_VOCAB_SIZE, TAGS, Tokenizer
from twelve.errors import InputError

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and it's 1234 times faster than 56 cats.",
    "나는 오늘 학교에서 수학을 배우고, 집에서 한국어 책을 3권 읽었다. 한국어는 재미있다.",
    "Numbers: 2024년 10월 31일. 한국어와 English를 섞어 쓴다.",
] * 8
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "몇이야? 12+30"},
    {"role": "assistant", "content": "<think>12+30=42</think><answer>42</answer>"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


@given(st.binary(max_size=200))
def test_any_bytes_come_back(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@given(st.text(max_size=100).map(lambda text: text + "<|im_end|> 한국어 <think>3"))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, control=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids).decode() == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.encode_bytes(text.encode()) == ids


@given(st.lists(st.integers(0, 500), max_size=30))
def test_any_ids_decode_alike_as_text_and_as_bytes(tokenizer, ids):
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def test_own_tokens(tokenizer):
    assert [tokenizer.id_of(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.end_id) == (0, 0, 0, 0)
    assert tokenizer.start_ids == [0]
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.decode(tokenizer.encode("<|im_start|><think>a</think><|im_end|>")) == "<think>a</think>"
    assert len(tokenizer.encode("<think></think><answer></answer>")) == 4


def test_control_tokens_can_be_spelled_out(tokenizer):
    assert tokenizer.encode("a<|im_end|>")[-1] == 2
    spelled = tokenizer.encode("a<|im_end|>", control=False)
    assert not tokenizer.stop_ids & set(spelled)
    assert [tokenizer.encode("a<|im_end|>", control=False), *tokenizer.encode_batch(["a<|im_end|>"], False)] == [
        spelled
    ] * 2


def test_digits_one_by_one_and_hangul_words_whole(tokenizer):
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode(" 한국어")) == 1  # frequent above
    words = tokenizer._backend.pre_tokenizer.pre_tokenize_str("한국어는 재미있다 12")
    assert [end - start for _, (start, end) in words] == [4, 5, 1, 1, 1]


def test_half_a_surrogate_pair_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("size", [0, 256, 257, MIN_VOCAB_SIZE - 1])
def test_vocabulary_too_small(size):
    with pytest.raises(InputError, match="too small"):
        Tokenizer.train(TEXTS, size)


def test_smallest_vocabulary_and_text_too_short_for_more():
    bytes_only = Tokenizer.train(TEXTS, MIN_VOCAB_SIZE)
    assert bytes_only.vocab_size == MIN_VOCAB_SIZE
    assert bytes_only.decode(bytes_only.encode("한 12")) == "한 12"
    assert MIN_VOCAB_SIZE <= Tokenizer.train(["aaaa bbbb"], 1000).vocab_size < 300


def test_training_is_repeatable_in_another_process(tokenizer):
    code = (
        "import sys, json; from twelve.data.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), 400).fingerprint)"
    )
    run = subprocess.run([sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True)
    assert run.stdout.strip() == tokenizer.fingerprint, run.stderr


def test_training_reads_a_stream_and_keeps_an_even_sample():
    stream = (f"{number:06}" for number in range(20_000))
    kept = [int(piece) for piece in sample(stream, 12_000)]
    assert 1000 < len(kept) <= 2000
    thirds = [sum(low <= number < low + 5000 for number in kept) / len(kept) for low in range(0, 20_000, 5000)]
    assert all(0.2 < share < 0.3 for share in thirds)
    assert sample(["a<|im_end|>b<think>c"], 100, CONTROL + TAGS) == ["a", "b", "c"]  # as encode will cut it


def test_transformers_agrees(tokenizer, folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS[:3], "<|im_start|>user\n안녕 <think>3</think>\n\n  x", "\ttab\r\n🙂 ½ Ⅷ"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == tokenizer.decode(
            tokenizer.encode(text)
        )
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 0)
    assert len(theirs) == tokenizer.vocab_size
    history = [*MESSAGES, {"role": "user", "content": "다시"}]
    thought = {"role": "assistant", "content": "hm\n", "reasoning_content": "a\nb"}
    from twelve.data.chat import render

    for messages in (MESSAGES, MESSAGES[1:], history, [*history, thought], [*history, thought, *history]):
        for prompt in (True, False):
            shown = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert shown == render(tokenizer, messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", "qwen3"])
def test_transformers_agrees_beside_a_model(tokenizer, folder, tmp_path, model_type):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("한국어 1234 it's")["input_ids"] == tokenizer.encode("한국어 1234 it's")


def test_save_and_load(tokenizer, folder, tmp_path):
    loaded = Tokenizer.load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.stop_ids) == (0, 0, 0, {0, 2})
    Tokenizer.train(TEXTS, 300, model_max_length=512).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 512
    assert Tokenizer.load(tmp_path).config["model_max_length"] == 512


# --- the folders of others --------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(folder, tmp_path):
    """A copy of the folder, and a way to change its tokenizer_config.json."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def load(**changes) -> Tokenizer:
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return Tokenizer.load(tmp_path)

    load.folder = tmp_path
    return load


def test_tokens_as_text_or_objects(foreign):
    loaded = foreign(bos_token=None, eos_token={"content": "<|im_end|>", "special": True}, pad_token="<|im_end|>")
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.end_id) == (None, 2, 2, 0)
    assert foreign(eos_token="<|none such|>").eos_id is None


def test_added_tokens_of_the_config_alone(foreign):
    size = Tokenizer.load(foreign.folder).vocab_size
    loaded = foreign(
        added_tokens_decoder={str(size): {"content": "<|new|>", "special": True}, "0": {"content": "<|endoftext|>"}}
    )
    assert loaded.encode("a<|new|>")[-1] == size == loaded.vocab_size - 1
    assert loaded.decode([size]) == ""


def test_chat_templates_in_all_places(foreign):
    assert foreign(chat_template="one").chat_template == "one"
    both = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert foreign(chat_template=both).chat_template == "d"
    assert foreign(chat_template=both[:1]).chat_template == "t"
    assert foreign(chat_template=None).chat_template is None
    (foreign.folder / "chat_template.jinja").write_text("한 file")
    assert foreign(chat_template="one").chat_template == "한 file"


@pytest.mark.parametrize(("stored", "stops"), [(5, {0, 2, 5}), ([5, 6], {0, 2, 5, 6}), (None, {0, 2})])
def test_generation_config(foreign, stored, stops):
    (foreign.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
    assert foreign().stop_ids == stops


def test_a_stored_truncation_is_ignored(foreign, tokenizer):
    path = foreign.folder / "tokenizer.json"
    limit = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": limit}))
    assert foreign().encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_what_the_tokenizer_puts_before_a_text(foreign):
    path = foreign.folder / "tokenizer.json"
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    loaded = foreign()
    assert loaded.start_ids == [1]
    assert loaded.encode("") == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [None, "", "{", "[]", "{}", '{"version": "1.0"}', "cut", b"\xff\xfe"])
def test_damaged_folders(foreign, name, damage):
    path = foreign.folder / name
    if damage is None:
        path.unlink()
    elif damage == "cut":
        path.write_text(path.read_text()[:-40])
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        path.write_text(damage)
    if name == "tokenizer_config.json" and damage in ("{}", '{"version": "1.0"}'):
        assert Tokenizer.load(foreign.folder).eos_id is None
        return
    with pytest.raises(InputError) as error:
        Tokenizer.load(foreign.folder)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_and_bad_json(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="damaged"):
        Tokenizer.from_json("{}")


def test_a_tokenizer_without_bytes_says_so():
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words = Tokenizer.from_json(backend.to_str())
    assert words.encode("a") == [0]
    with pytest.raises(InputError, match="byte-level"):
        words.decode_bytes([0])
