"""What is said before a training, and the training that follows it without sizes."""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from twelve.compiler import cache_folder
from twelve.config import small_v3, with_memory
from twelve.convert import save
from twelve.convert.gguf_export import export
from twelve.data.corpus import tokenize
from twelve.data.shards import PackedData
from twelve.data.survey import survey
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.model import Transformer
from twelve.plan.machine import Machine
from twelve.planner import plan
from twelve.train import outlook
from twelve.train.loop import Supervised
from twelve.train.pretrain import pretrain

sys.path.append(str(Path(__file__).resolve().parents[1] / "plan"))
from scaled import made_up

GIB = 2**30
ASKED = {"minutes": 15, "batch": 1, "context": 256, "quiet": True}
MACHINE = Machine(
    host="here", processor="some", cores=1, threads=1, torch="2", gflops={"float32": 100.0}, memory_gb_s=10.0,
    disk_gb_s=1.0, gpus=[], compiler=None, memory_total=16 * GIB, memory_available=8 * GIB, disk_free=100 * GIB,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rows = [f"{n} apples and {n * 7 % 97} pears. 사과 {n}개와 배 {n * 7 % 97}개." for n in range(400)]
    (folder / "fruit.jsonl").write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def known(monkeypatch):
    """A machine that need not be measured, and runs of small models on it."""
    monkeypatch.setattr(outlook, "measure", lambda: MACHINE)
    monkeypatch.setattr(outlook, "product_speed", lambda clock: 100.0)
    monkeypatch.setattr(outlook, "load", lambda: made_up(widths=(64, 128), vocabularies=(300, 512)))


def test_what_is_expected_is_between_the_speed_of_now_and_that_of_before(known, text, monkeypatch):
    usual = outlook.expect([text], 1)
    monkeypatch.setattr(outlook, "product_speed", lambda clock: 64.0)
    slower = outlook.expect([text], 1)
    assert slower.shape() == usual.shape()  # whatever the moment is like
    assert slower.best.tokens_per_second == pytest.approx(0.8 * usual.best.tokens_per_second)
    again = []
    monkeypatch.setattr(outlook, "measure", lambda refresh=False: again.append(refresh) or MACHINE)
    monkeypatch.setattr(outlook, "product_speed", lambda clock: 30.0)  # another machine, as good as
    assert outlook.expect([text], 1).best.tokens_per_second == usual.best.tokens_per_second and again == [False, True]


def test_a_survey_knows_how_much_text_there_is(text, tmp_path):
    rows = [json.loads(line)["text"] for line in (text / "fruit.jsonl").read_text().splitlines()]
    size = sum(len(row.encode()) for row in rows)
    assert survey([text]).text_bytes == pytest.approx(size, rel=0.01)
    packed = tmp_path / "fruit.jsonl.gz"
    packed.write_bytes(gzip.compress((text / "fruit.jsonl").read_bytes()))
    assert survey([packed]).text_bytes == pytest.approx(size, rel=0.01)
    once, both = survey([text]), survey([text, packed])
    assert both.text_bytes == pytest.approx(2 * once.text_bytes, rel=0.01)
    assert 0 < once.preparing(300) < replace(once, text_bytes=both.text_bytes).preparing(300) < 60
    tokenize([text], tmp_path / "tokens", vocab_size=300, progress=False)
    shards = survey([tmp_path / "tokens"])
    entries = Tokenizer.load(tmp_path / "tokens").vocab_size
    assert (shards.text_bytes, shards.vocabulary) == (size, entries) and shards.preparing(entries) == 0
    words = survey([text], tmp_path / "tokens")
    assert words.vocabulary == entries and words.bytes_per_token == pytest.approx(shards.bytes_per_token, rel=0.1)
    dirty = survey([text], filter=True)
    assert once.filtering == 0 and dirty.preparing(300) > replace(dirty, filtering=0.0).preparing(300)
    assert survey(["-"]).text_bytes is None
    with pytest.raises(InputError, match="no such file"):
        survey([tmp_path / "none.txt"])


def test_pretraining_without_sizes_takes_the_plans_and_a_resume_keeps_them(text, known, tmp_path, monkeypatch, capsys):
    real, steps = Supervised.train_step, []

    def killed(self):
        if self.step == 12:
            raise RuntimeError("killed")
        steps.append(self.step)
        return real(self)

    monkeypatch.setattr("twelve.train.run.CALIBRATION_SECONDS", 0.0)
    whole = pretrain([text], tmp_path / "whole", **ASKED)
    told = capsys.readouterr().out
    chosen = json.loads((tmp_path / "whole" / "training" / "plan.json").read_text())
    expected = chosen["outlook"]
    shape = (chosen["config"]["vocab_size"], expected["width"], expected["layers"], expected["experts"], 2, 256)
    planned = small_v3(*shape, **with_memory()).to_dict()
    for key in ("hidden_size", "num_hidden_layers", "n_routed_experts", "moe_intermediate_size", "engram_layer_ids"):
        assert chosen["config"][key] == planned[key]
    assert f"width {expected['width']}, {expected['layers']} layers" in told and "why " in told
    # the text is short, so the run ends when it was read four times
    assert whole["tokens"] == pytest.approx(4 * chosen["data"]["tokens"], rel=0.02)

    # another machine would choose otherwise; a run that began goes on as it was
    monkeypatch.setattr("twelve.train.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("twelve.train.loop.SAVE_SHARE", 1e9)
    monkeypatch.setattr(Supervised, "train_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain([text], tmp_path / "part", **ASKED)
    monkeypatch.setattr(Supervised, "train_step", real)
    monkeypatch.setattr(outlook, "load", lambda: made_up(widths=(256,), vocabularies=(300, 512)))
    pretrain([text], tmp_path / "part", **ASKED)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_that_is_trained_already_reads_otherwise_and_more_slowly(text, tmp_path, monkeypatch):
    sizes = {"width": 64, "layers": 1, "experts": 0, "vocab_size": 300}
    common = {"steps": 1, "context": 32, "batch": 2, "quiet": True}
    seen = []
    batch = PackedData.batch
    monkeypatch.setattr(PackedData, "batch", lambda *given: seen.append(given[1:]) or batch(*given))
    pretrain([text], tmp_path / "a", **sizes, **common)
    pretrain([text], tmp_path / "b", start=tmp_path / "a", **common)
    made = [json.loads((tmp_path / name / "training" / "plan.json").read_text()) for name in "ab"]
    assert [plan["learning_rate"] for plan in made] == [4e-3, 1e-3] and [plan["seed"] for plan in made] == [0, 0]
    orders = [order for _, _, _, order in seen]
    assert orders[0] == 0 and orders[-1] != 0


def test_sizes_that_are_given_need_no_plan(text, tmp_path, monkeypatch):
    monkeypatch.setattr("twelve.train.pretrain.expect", lambda *a, **k: pytest.fail("planned"))
    pretrain([text], tmp_path / "run", steps=1, width=64, vocab_size=300, context=32, batch=2, quiet=True)
    made = json.loads((tmp_path / "run" / "training" / "plan.json").read_text())
    assert made["config"]["num_hidden_layers"] == 4 and made["config"]["n_routed_experts"] == 8  # as ever
    assert (made["learning_rate"], made["micro_batch_size"], made["outlook"]) == (4e-3, 2, {})
    assert (made["config"]["model_type"], made["config"]["engram_layer_ids"]) == ("twelve", [1, 2])


def test_a_memory_grows_with_what_training_reads_up_to_what_the_text_fills():
    rows = [with_memory(reading=tokens)["engram_vocab_size"] for tokens in (0, 10**6, 10**7, 2**24, 2**24 - 1, 10**12)]
    assert rows == [65536, 65536, 2**18, 2**19, 2**18, 2**20]
    assert with_memory(text=10**7, reading=10**8)["engram_vocab_size"] == 2**18  # read ten times
    assert with_memory(text=3000, reading=10**8)["engram_vocab_size"] == 4096
    assert with_memory({"engram_vocab_size": 7}, reading=10**8)["engram_vocab_size"] == 7


def test_zero_rows_leave_the_memory_out(text, known, tmp_path):
    without = {"engram_vocab_size": 0}
    assert with_memory({"hc_mult": 4, "engram_dtype": "int8", **without}) == {"hc_mult": 4}
    assert with_memory(text=3000)["engram_vocab_size"] == 4096 < with_memory()["engram_vocab_size"]
    pretrain([text], tmp_path / "run", steps=1, width=64, vocab_size=300, context=32, batch=2, quiet=True,
             switches=without)  # fmt: skip
    made = json.loads((tmp_path / "run" / "config.json").read_text())
    assert made["model_type"] == "deepseek_v3" and not any(key.startswith("engram") for key in made)
    asked = {"minutes": 3, "memory": 4 * GIB}
    plain, whole = (plan([str(text)], **asked, switches=given) for given in (without, None))
    assert "memory of" in whole["shape"] and "memory of" not in plain["shape"]


def test_a_memory_limit_makes_micro_batches_smaller(text, tmp_path):
    config = small_v3(300, 64, 1, 0, 2, 256)
    needed = {rows: sum(outlook.training(config, rows, 256, data_tokens=0).values()) for rows in (4, 64)}
    assert outlook.fitting_micro_batch(config, 64, 256, needed[4] + 1000, 0) == 4
    assert outlook.fitting_micro_batch(config, 64, 256, None, 0) == 64
    with pytest.raises(InputError, match="do not hold this training"):
        pretrain([text], tmp_path / "run", steps=1, width=64, vocab_size=300, memory=1 << 20, quiet=True)


def test_the_verb_tells_of_a_run(text, known):
    assert plan([str(text)], minutes=5, filter=True)["next"] == f"twelve pretrain {text} --minutes 5 --filter"
    result = plan([str(text)], minutes=5, memory=2 * GIB, watts=100.0, price=0.5, currency="EUR")
    expected = result["expected"]
    assert result["next"] == f"twelve pretrain {text} --minutes 5 --memory 2048MiB"
    assert expected["seconds"] <= 300 and sum(expected["memory"].values()) < 2 * GIB
    assert sum(expected["times"].values()) == pytest.approx(expected["seconds"], abs=0.5)
    hours = expected["seconds"] / 3600 * 0.1
    spent = result["energy_and_money"]
    assert spent["kilowatt_hours"] == pytest.approx(hours, rel=0.01)
    assert spent["money"] == pytest.approx(hours / 2, rel=0.01) and "EUR at 0.5" in result["energy"]
    assert result["phases"].keys() == {"sampling", "scoring", "update"} and "expected" in result["bits_per_byte"]
    assert ("dense is better" in result["why"]) == (expected["experts"] == 0)
    endless = plan(minutes=5)
    assert endless["expected"]["tokens"] > 2 * expected["tokens"] and endless["corpus"]["text_bytes"] is None
    memory = plan(minutes=5, switches={"hc_mult": 4, "engram_vocab_size": 997})["expected"]["memory"]
    assert memory["streams"] > 0 and memory["table"] > 0


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"minutes": 0.0}, "0 minutes are no time"),
        ({"minutes": 0.05}, "too few for 20 steps"),
        ({"memory": 64 * GIB}, "64.00 GiB are more than the 16.00 GiB that there are"),
        ({"memory": GIB // 8}, "0.12 GiB are too little to train any model"),
        ({"device": "meta"}, "meta is neither"),
        ({"model": "no such model"}, "no such model does not exist; .* or a config.json, or a preset: deepseek"),
    ],
)
def test_what_cannot_be_met_says_why(text, known, asked, words):
    with pytest.raises(InputError, match=words) as told:
        plan([str(text)], **asked)
    assert "\n" not in str(told.value)


def test_tokens_have_a_vocabulary_already(text, known, tmp_path):
    tokenize([text], tmp_path / "shards", None, 300, progress=False)
    shards = [str(tmp_path / "shards")]
    for option, given in (("vocab-size", 512), ("tokenizer", "nowhere"), ("filter", True)):
        for call in (plan, lambda paths, **more: pretrain(paths, tmp_path / "run", steps=1, quiet=True, **more)):
            with pytest.raises(InputError, match=f"holds tokens and their tokenizer: leave out --{option}"):
                call(shards, **{option.replace("-", "_"): given})
    with pytest.raises(InputError, match="a vocabulary of 100 is too small"):
        plan([str(text)], vocab_size=100)
    with pytest.raises(InputError, match="nowhere"):
        plan(tokenizer="nowhere")
    with pytest.raises(InputError, match="--filter says what is done with text"):
        plan(filter=True)
    assert plan(tokenizer=shards[0])["expected"]["vocab_size"] == Tokenizer.load(shards[0]).vocab_size


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"experts": 4, "experts_per_token": 16}, "--experts-per-token 16: there are 4 experts"),
        ({"switches": {"engram_vocab_size": 0, "engram_layer_ids": [7]}}, "--engram-layers is for a memory, and"),
        ({"switches": {"engram_vocab_size": 1 << 40}}, "--engram-vocab-size 1099511627776: 4294967296 rows"),
        ({"mtp": 3_000_000}, "--mtp 3000000: 64 modules are the most"),
        ({"width": 1 << 20, "layers": 99, "experts": 0}, r"needs at least [\d.]+ GiB, and there are"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(text, tmp_path, asked, words):
    with pytest.raises(InputError, match=words):
        pretrain([text], tmp_path / "run", **({"steps": 1, "width": 64, "vocab_size": 300, "quiet": True} | asked))
    assert not (tmp_path / "run" / "config.json").exists()


def test_too_little_text_says_so(known, tmp_path):
    (tmp_path / "short.txt").write_text("twelve ships " * 20)
    with pytest.raises(InputError, match="260 bytes of text are too little to learn from"):
        plan([str(tmp_path / "short.txt")])
    with pytest.raises(InputError, match="too little to learn from"):
        pretrain([tmp_path / "short.txt"], tmp_path / "run", minutes=1, quiet=True)
    assert not (tmp_path / "run").exists()


def test_published_models_are_told_of(tmp_path):
    result = plan(model="deepseek_v3")
    assert (result["parameters"], result["kv_bytes_per_token"]) == (671_026_419_200, 70_272)
    assert "does not fit" in result["training_memory"]
    config = {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(model=str(tmp_path))["parameters"] == plan(model="deepseek_v2_lite")["parameters"] == 15_706_484_224


def test_a_model_may_be_any_that_can_be_read(tmp_path):
    """A .gguf file, and the name of a model that was fetched."""
    words = Tokenizer.train(["twelve ships went out to sea"] * 9, 300)
    model = Transformer(small_v3(words.vocab_size, 64, 2, 0, 2, 128)).init_weights(0)
    save(model, words, tmp_path / "folder")
    export(tmp_path / "folder", tmp_path / "model.gguf", "float32")
    pulled = cache_folder() / "models" / "someone" / "ship"
    pulled.parent.mkdir(parents=True)
    (tmp_path / "folder").rename(pulled)
    (pulled / "pull.json").write_text("{}")
    sizes = [plan(model=name)["parameters"] for name in (str(tmp_path / "model.gguf"), "someone/ship")]
    assert sizes == [sum(parameter.numel() for parameter in model.parameters())] * 2
