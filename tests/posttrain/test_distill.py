"""The verb: students cut and fresh, chains of folders, resume after SIGKILL, bad input in one line."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small import folder, llama, model, v3

from twelve import cli, convert
from twelve.config import small_v3
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.files import sha256
from twelve.model import Transformer
from twelve.posttrain import distill as distilling
from twelve.posttrain.distill import distill
from twelve.posttrain.student import cut, fresh, kept_layers, make_student
from twelve.train.pretrain import pretrain

# --- students ---------------------------------------------------------------------------------------------------------


def test_first_and_last_layers_stay_and_the_rest_is_spread():
    assert [kept_layers(12, n) for n in (1, 2, 3, 4, 12)] == [
        [0], [0, 11], [0, 6, 11], [0, 4, 7, 11], list(range(12)),
    ]  # fmt: skip
    for depth in range(1, 40):
        for count in range(2, depth + 1):
            kept = kept_layers(depth, count)
            steps = [b - a for a, b in pairwise(kept)]
            assert len(kept) == count and (kept[0], kept[-1]) == (0, depth - 1) and max(steps) - min(steps) <= 1
    with pytest.raises(InputError, match="--layers 5: the teacher has 4 layers"):
        kept_layers(4, 5)


def shapes(tokenizer):
    yield "llama", llama(tokenizer, 5)
    yield "qwen3", replace(llama(tokenizer, 5), model_type="qwen3", tie_word_embeddings=False)
    yield "v3", v3(tokenizer, 5, first_k_dense_replace=2)
    yield "v3-mtp", v3(tokenizer, 5, num_nextn_predict_layers=1)
    yield "v3-dense-then-mtp", v3(tokenizer, 5, first_k_dense_replace=5, num_nextn_predict_layers=1)
    yield "v3-all-dense", v3(tokenizer, 5, first_k_dense_replace=9, num_nextn_predict_layers=1)
    yield "v2", replace(v3(tokenizer, 5), model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax")


@pytest.mark.parametrize("layers", [1, 2, 4, 5])
def test_what_is_left_computes_what_these_layers_did(tokenizer, tmp_path, layers):
    ids = torch.randint(0, 300, (2, 17))
    for name, config in shapes(tokenizer):
        teacher = model(config)
        with torch.no_grad():
            twin = model(config)
            kept = kept_layers(5, layers)
            twin.layers = torch.nn.ModuleList(twin.layers[index] for index in kept)
            expected, mtp = twin(ids), twin.mtp_logits(ids)
            student, which = cut(teacher, layers)
            assert which == kept
            torch.testing.assert_close(student(ids), expected)
            convert.save(student, tokenizer, tmp_path / name)
            again, _ = convert.load(tmp_path / name)
            torch.testing.assert_close(again(ids), expected)
            for ours, theirs in zip(again.mtp_logits(ids), mtp, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_a_cut_folder_loads_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    student, _ = cut(model(v3(tokenizer, 5, first_k_dense_replace=2)), 3)
    convert.save(student, tokenizer, tmp_path / "student")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, student(ids), rtol=1e-4, atol=1e-4)
    assert peer.config.first_k_dense_replace == 1 and peer.config.num_hidden_layers == 3


def test_a_fresh_student_has_its_teachers_tokenizer(tokenizer):
    student = fresh(tokenizer, 128, width=64, layers=2, experts=4)
    assert student.config.vocab_size == tokenizer.vocab_size and student.config.eos_token_id == tokenizer.eos_id
    assert student.config.n_routed_experts == 4 and student.config.max_position_embeddings == 128


def test_a_student_has_a_memory_where_its_teacher_has_one(tokenizer, tmp_path):
    """However it is made: cut it keeps the teacher's rows, fresh it has an empty table of that size."""
    switches = {"engram_vocab_size": 53, "engram_n_heads": 2, "engram_head_dim": 8, "engram_layer_ids": [0, 3]}
    network = Transformer(small_v3(tokenizer.vocab_size, 64, 4, 4, 2, 64, **switches))
    network.memory.use_tokenizer(tokenizer)
    convert.save(network.init_weights(0), tokenizer, tmp_path / "teacher")
    for name, size in (("cut", {}), ("wide", {"width": 128}), ("dense", {"experts": 0})):
        make_student(tmp_path / "teacher", tmp_path / name, 2, **size)
        student, _ = convert.load(tmp_path / name)
        config, table = student.config, student.memory.table
        assert (config.engram_n_heads, table.width) == (2, 8) and table.count > 2 * 2 * 53, name
        assert (student.memory.compressed == network.memory.compressed).all()
        moved = ([0, 1], [0, 3]) if name == "cut" else ([1], None)
        assert (config.engram_layer_ids, config.engram_hash_layers) == moved
        assert student(torch.tensor([[5, 6, 7]])).isfinite().all()
    plain = folder(tmp_path / "plain", tokenizer, v3(tokenizer, 2))
    make_student(plain, tmp_path / "without", 1, width=64)
    assert convert.load(tmp_path / "without")[0].memory is None


# --- runs -------------------------------------------------------------------------------------------------------------

TASK = '''"""Ships: the answer is always 12."""


def generate(seed, level, language):
    return {"question": f"How many ships are left on day {seed % 100_000}?", "answer": 12}


def score(problem, text):
    return float(text.rstrip().endswith("<answer>12</answer>"))
'''


def test_rows_that_are_for_training_only_can_be_distilled(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(distilling, "_run", lambda *_: {"model": "m", "student": "s"})
    base, path = folder(tmp_path / "base", tokenizer, llama(tokenizer)), tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": 2}')
    asked = {"student": base, "steps": 1, "quiet": True}
    assert distill([base], tmp_path / "out", task=[f"{path}#train"], **asked)["next"] == "twelve chat m"
    path.write_text('{"question": "1 + 1?", "answer": 3}')
    with pytest.raises(InputError, match="rows.jsonl#train is not the file that this run began with"):
        distill([base], tmp_path / "out", task=[f"{path}#train"], **asked)
    result = distill([base], tmp_path / "other", task=["arithmetic"], level=[2], **asked)
    assert result["next"] == "twelve eval m --task arithmetic --level 2"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A task, and a teacher that can do it; it has three layers."""
    place = tmp_path_factory.mktemp("distill")
    (place / "ships.py").write_text(TASK)
    with open(place / "talk.jsonl", "w") as file:
        for n in range(400):
            asked = {"role": "user", "content": f"How many ships are left on day {n * 37 % 100_000}?"}
            said = {"role": "assistant", "content": f"<think>{'ho ' * (n % 3)}12</think><answer>12</answer>"}
            file.write(json.dumps({"messages": [asked, said]}) + "\n")
    pretrain([str(place / "talk.jsonl")], place / "teacher", steps=40, width=64, layers=3, experts=4, vocab_size=300,
             context=64, batch=4, switches={"engram_vocab_size": 500}, quiet=True)  # fmt: skip
    return place


SHORT = {"steps": 8, "traces": 24, "samples": 2, "max_tokens": 30, "batch": 4, "quiet": True}


def test_a_chain_of_traces_leaves_loadable_folders(room, tmp_path):
    out = tmp_path / "out"
    asked, given = ([str(room / "teacher")], out), {"task": [str(room / "ships.py")], "context": 64, **SHORT}
    result = distill(*asked, layers=[3, 2, 1], **given)
    assert [stage["model"] for stage in result["stages"]] == [str(out / f"{i}-layers-{n}") for i, n in
                                                             ((1, 3), (2, 2), (3, 1))]  # fmt: skip
    for stage, layers in zip(result["stages"], (3, 2, 1), strict=True):
        assert convert.load(stage["model"])[0].config.num_hidden_layers == layers
        assert 0 < stage["traces"] <= 24 and 0 < stage["pass_rate"] <= 1 and stage["steps"] == 8
    assert "layers 0, 2 of the 3 of" in result["stages"][1]["student"]
    assert str(out / "2-layers-2") in result["stages"][2]["student"]
    rows = [json.loads(line) for line in (out / "1-layers-3" / "training" / "traces.jsonl").read_text().splitlines()]
    assert all(row["messages"][-1]["content"].endswith("<answer>12</answer>") for row in rows)
    assert (out / "report.html").exists() and result["model"] == str(out / "3-layers-1")
    again = distill(*asked, layers=[3, 2, 1], **given)
    assert again["stages"] == result["stages"]
    with pytest.raises(InputError, match="with seed=0, not 1"):
        distill(*asked, layers=[3, 2, 1], seed=1, **given)


@pytest.mark.parametrize("how", ["logits", "on-policy"])
def test_probabilities_flow_down_a_chain_too(room, tmp_path, how):
    context = {"context": 64} if how == "logits" else {}
    result = distill([str(room / "teacher")], tmp_path / "out", how=how, layers=[2, 1], task=[str(room / "ships.py")],
                     **SHORT, **context)  # fmt: skip
    for stage in result["stages"]:
        assert convert.load(stage["model"])[0](torch.tensor([[1, 2]])).isfinite().all() and stage["loss"] >= 0
    assert [convert.load_config(stage["model"]).num_hidden_layers for stage in result["stages"]] == [2, 1]


def test_a_fresh_student_and_adapters(room, tmp_path):
    teacher, given = str(room / "teacher"), {"task": [str(room / "ships.py")], **SHORT}
    new = distill([teacher], tmp_path / "new", layers=[1], width=64, experts=0, **given)
    config = convert.load_config(new["model"])
    assert config.hidden_size == 64 and config.n_routed_experts is None and "fresh" in new["stages"][0]["student"]
    low = distill([teacher], tmp_path / "low", student=teacher, lora=2, **given)
    assert sha256(f"{low['model']}/model.safetensors") != sha256(room / "teacher" / "model.safetensors")


def test_another_tokenizer_learns_from_traces_but_not_from_logits(room, tmp_path):
    words = Tokenizer.train(["열두 척의 배가 남아 있습니다", "twelve ships are left <answer>"] * 9, vocab_size=330)
    student = folder(tmp_path / "student", words, llama(words, max_position_embeddings=512))
    ask = {"student": student, "task": [str(room / "ships.py")], "teacher_for": {}}
    result = distill([str(room / "teacher")], tmp_path / "traces", **ask, **SHORT)
    assert convert.load_config(result["model"]).vocab_size == words.vocab_size
    for how in ("logits", "on-policy"):
        with pytest.raises(InputError, match="use --how traces"):
            distill([str(room / "teacher")], tmp_path / how, how=how, **ask, **SHORT)
        assert not (tmp_path / how).exists()


def test_an_error_before_any_work_does_not_hold_the_folder(room, tmp_path):
    """It was found by the stage, after the folder had its options: the mended command may be another."""
    teacher, ask = str(room / "teacher"), {**SHORT, "how": "on-policy", "layers": [1], "task": [str(room / "ships.py")]}
    with pytest.raises(InputError, match="6 answers a step are not a multiple"):
        distill([teacher], tmp_path / "out", **ask | {"batch": 6})
    assert distill([teacher], tmp_path / "out", **ask | {"batch": 8})["stages"][0]["steps"] == SHORT["steps"]


KILLED = """
import sys, torch, time
torch.set_num_threads(1)
from twelve.train import loop
from twelve.posttrain import traces
loop.SAVE_EVERY, loop.SAVE_SHARE = 0.0, 1e9
step = loop.Supervised.train_step
loop.Supervised.train_step = lambda self: (time.sleep(0.05), step(self))[1]
accepted = traces._accepted
traces._accepted = lambda *a: (time.sleep(0.01), accepted(*a))[1]
from twelve.posttrain.distill import distill
distill([sys.argv[1]], sys.argv[2], layers=[2, 1], task=[sys.argv[3]], steps=8, traces=24, samples=2, max_tokens=30,
        batch=4, context=64, quiet=True)
"""


def test_a_killed_chain_goes_on_to_the_same_weights(room, tmp_path):
    ships = str(room / "ships.py")
    distill([str(room / "teacher")], tmp_path / "whole", layers=[2, 1], task=[ships], context=64, **SHORT)
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", KILLED, str(room / "teacher"), str(out), ships]
    for mark in ("1-layers-2/training/sampled.jsonl", "2-layers-1/training/checkpoint.safetensors"):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (out / mark).exists() and (out / mark).stat().st_size:
                break
            time.sleep(0.005)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
    distill([str(room / "teacher")], out, layers=[2, 1], task=[ships], context=64, **SHORT)
    for name in ("training/traces.jsonl", "model.safetensors"):
        for stage in ("1-layers-2", "2-layers-1"):
            assert sha256(out / stage / name) == sha256(tmp_path / "whole" / stage / name)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--layers", "1"], "nowhere does not exist"),
        (["TEACHER"], "name the student"),
        (["TEACHER", "--layers", "1", "--student", "x"], "name the student"),
        (["TEACHER", "--layers", "4"], "--layers 4: the teacher has 3 layers"),
        (["TEACHER", "--layers", "2,3"], "--layers 3: the teacher has 2 layers"),
        (["TEACHER", "--layers", "2;1"], "--layers: '2;1' is not a whole number"),
        (["TEACHER", "--layers", "1", "--task", "chess"], "unknown task 'chess'"),
        (["TEACHER", "--layers", "1", "--teacher-for", "arithmetic"], "not of the form NAME=VALUE"),
        (["TEACHER", "--layers", "1", "--teacher-for", "chess=TEACHER"], "--teacher-for chess: this is none of"),
        (["TEACHER", "TEACHER", "--layers", "1", "--how", "logits"], "takes one teacher"),
        (["http://127.0.0.1:9/v1", "--layers", "1"], "neither layers nor a tokenizer"),
        (["http://127.0.0.1:9/v1", "--student", "TEACHER", "--how", "on-policy"], "gives text, not probabilities"),
        (["TEACHER", "--student", "TEACHER", "--task", "arithmetic", "--traces", "4", "--max-tokens", "4"],
         "nothing passed the verifier: 0 of 32 answers to 8 problems of arithmetic, a pass rate of 0%"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(room, tmp_path, capsys, arguments, words):
    arguments = [part.replace("TEACHER", str(room / "teacher")) for part in arguments]
    assert cli.main(["distill", *arguments, "--out", str(tmp_path / "out"), "--steps", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("twelve: error: ") and words in error


def test_the_verb_prints_a_line_for_each_stage(room, tmp_path, capsys):
    given = ["--task", str(room / "ships.py"), "--steps", "3", "--traces", "9", "--max-tokens", "30"]
    status = cli.main(["distill", str(room / "teacher"), "--layers", "2,1", "--out", str(tmp_path / "out"), *given])
    out = capsys.readouterr().out.splitlines()
    assert status == 0 and [line[:7] for line in out if line.startswith("stage ") and "parameters" in line] == [
        "stage 1", "stage 2",
    ]  # fmt: skip
    assert out[-1].startswith("next: twelve eval ")
