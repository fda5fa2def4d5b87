"""`twelve pull` against a hub on loopback: whole, resumed, checked, and one line for whatever goes wrong."""

import builtins
import errno
import io
import json
import os
import sys

import pytest
import torch
from loopback_hub import LoopbackHub

from twelve import cli, convert
from twelve import pull as pull_module
from twelve.config import small_v3
from twelve.convert import card
from twelve.convert.huggingface import INDEX, TABLE
from twelve.errors import InputError
from twelve.hub import TRIES, Hub
from twelve.model.transformer import Transformer
from twelve.pull import pull

package = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
NAME, WEIGHTS = LoopbackHub.NAME, "model.safetensors"
CARD = "---\nlicense: mit\nlanguage:\n- en\n- ko\n---\n# Small\n"
SECRET = "hf_a_token_that_no_message_may_show"


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A folder with a small model, and its weights once more in shards."""
    network = Transformer(small_v3(tokenizer.vocab_size, 64, 2, 4, 2, 64)).init_weights(0).eval()
    folder = tmp_path_factory.mktemp("hub")
    convert.save(network, tokenizer, folder / "one", card=CARD)
    convert.save(network, tokenizer, folder / "shards", card=CARD, shard_bytes=100_000)
    return folder


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    """No proxy, no token, no telemetry, a home of its own, and no waiting between attempts."""
    for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("twelve.hub.time.sleep", lambda seconds: None)
    package.close_session()
    yield
    package.close_session()


@pytest.fixture
def hub(model):
    with LoopbackHub(files_of(model / "one")) as running:
        yield running


def fetch(hub, **options):
    return pull(NAME, endpoint=hub.url, quiet=True, **options)


def refused(words: str, hub=None, **options) -> str:
    with pytest.raises(InputError, match=words) as caught:
        fetch(hub, **options) if hub else pull(NAME, quiet=True, **options)
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    return str(caught.value)


def test_a_pulled_model_is_whole_and_found_by_its_name(hub, model, tmp_path):
    result = fetch(hub)
    folder = tmp_path / "cache" / "twelve" / "models" / NAME
    stated = {"name": NAME, "revision": "main", "commit": hub.commit}
    assert files_of(folder).keys() == {*hub.files, "pull.json"}
    assert json.loads((folder / "pull.json").read_text()) == stated
    assert all((folder / name).read_bytes() == content for name, content in hub.files.items())
    assert result["bytes"] == result["bytes_fetched"] == sum(map(len, hub.files.values()))
    assert result["licence"] == "mit" and result["next"] == f"twelve chat {NAME}"
    ours, tokenizer = convert.load(NAME, device="cpu")
    theirs, _ = convert.load(model / "one", device="cpu")
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight) and tokenizer.chat_template
    assert card.origin(NAME)["base_model"] == [NAME] and card.origin(NAME)["license"] == ["mit"]
    asked = len(hub.requests)
    assert fetch(hub)["bytes_fetched"] == 0 and len(hub.requests) == asked + 1  # the listing; the rest is checked here


def test_shards_come_with_their_index(hub, model, tmp_path):
    hub.files = files_of(model / "shards") | {"consolidated.safetensors": b"not wanted", "pytorch_model.bin": b"\x80"}
    result = fetch(hub, out=tmp_path / "out")
    assert result["next"] == f"twelve chat {tmp_path / 'out'}"
    assert files_of(tmp_path / "out").keys() == {*files_of(model / "shards"), "pull.json"}
    convert.load(tmp_path / "out")


@pytest.mark.parametrize("reset", [False, True])
def test_a_dropped_connection_is_taken_up_where_it_broke(hub, tmp_path, reset):
    size = len(hub.files[WEIGHTS])
    hub.reset, hub.cuts[WEIGHTS] = reset, [size // 2, 1000]
    result = fetch(hub, out=tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    first, *others = hub.asked(WEIGHTS)
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in others]
    assert first is None and starts == sorted(starts) and 0 < starts[-1] <= size // 2 + 1000
    if not reset:  # a reset may take what had arrived with it
        assert starts == [size // 2, size // 2 + 1000]
    assert result["bytes_fetched"] == sum(map(len, hub.files.values()))  # no byte twice


def test_the_next_call_goes_on_where_one_gave_up(hub, tmp_path):
    size = len(hub.files[WEIGHTS])
    hub.cuts[WEIGHTS] = [300_000] + [0] * (TRIES + 1)
    refused("no connection.*run the same command again", hub)
    with pytest.raises(InputError, match=f"here only in part: `twelve pull {NAME}` goes on"):
        convert.load(NAME)
    hub.cuts, hub.requests = {}, []
    result = fetch(hub)
    assert hub.asked(WEIGHTS) == ["bytes=300000-"] and result["bytes_fetched"] == size - 300_000
    convert.load(NAME)
    assert not [name for name in files_of(convert.resolve(NAME)) if name.startswith(".")]


def test_ctrl_c_says_how_far_it_came(hub, monkeypatch, capsys):
    stream = Hub._stream

    def stopped(self, url, have):
        for place, chunk in stream(self, url, have):
            yield place, chunk
            if url.endswith(WEIGHTS):
                raise KeyboardInterrupt

    monkeypatch.setattr(Hub, "_stream", stopped)
    assert cli.main(["pull", NAME, "--endpoint", hub.url]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"twelve: stopped: {NAME}: ") and "goes on from there" in last
    monkeypatch.setattr(Hub, "_stream", stream)
    assert fetch(hub)["bytes_fetched"] < len(hub.files[WEIGHTS])


def test_a_server_that_cannot_go_on_begins_again(hub, tmp_path):
    hub.ranges, hub.cuts[WEIGHTS] = False, [100_000]
    result = fetch(hub, out=tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert result["bytes_fetched"] == 100_000 + sum(map(len, hub.files.values()))


@pytest.mark.parametrize("path", [WEIGHTS, "tokenizer.json", "config.json"])
def test_a_wrong_hash_is_told_and_its_file_removed(hub, path, tmp_path):
    right = hub.files[path]
    hub.sent[path] = right[:-1] + bytes([right[-1] ^ 1])
    refused(f"{path} came with another hash than {NAME} states, and was removed", hub, out=tmp_path / "out")
    left = files_of(tmp_path / "out")
    assert path not in left and "config.json" not in left
    assert not [name for name in left if path in name and "part" in name]
    del hub.sent[path]
    fetch(hub, out=tmp_path / "out")
    convert.load(tmp_path / "out")


def test_damage_on_the_disk_is_found_and_mended(hub, tmp_path):
    fetch(hub, out=tmp_path / "out")
    damaged = bytearray(hub.files[WEIGHTS])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "out" / WEIGHTS).write_bytes(damaged)
    assert fetch(hub, out=tmp_path / "out")["bytes_fetched"] == len(damaged)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_a_new_revision_takes_the_place_of_the_old_one(hub, model):
    fetch(hub)
    hub.files, hub.commit = files_of(model / "shards"), "d" * 40
    fetch(hub)
    assert files_of(convert.resolve(NAME)).keys() == {*hub.files, "pull.json"}  # no second set of weights
    convert.load(NAME)


def test_half_a_new_revision_is_no_model(hub, model):
    hub.files = files_of(model / "shards")
    fetch(hub)
    first, second = sorted(name for name in hub.files if name.endswith(".safetensors"))[:2]
    hub.files = hub.files | {name: hub.files[name][:-1] + b"\x01" for name in (first, second)}  # the same config.json
    hub.commit, hub.cuts[second] = "d" * 40, [0] * (TRIES + 1)
    refused("no connection|broke off", hub)
    with pytest.raises(InputError, match="is here only in part: `twelve pull"):
        convert.load(NAME)
    hub.cuts = {}
    fetch(hub)
    convert.load(NAME)
    assert files_of(convert.resolve(NAME))[second] == hub.files[second]


def test_an_update_that_replaces_nothing_leaves_the_model(hub, monkeypatch):
    fetch(hub)
    hub.files, hub.commit = hub.files | {"README.md": hub.files["README.md"] + b"more"}, "d" * 40
    hub.cuts["README.md"] = [0] * (TRIES + 1)
    refused("no connection|broke off", hub)
    convert.load(NAME)
    hub.cuts, hub.files = {}, hub.files | {WEIGHTS: hub.files[WEIGHTS] + b"\x01"}
    with monkeypatch.context() as full:
        full.setattr(pull_module, "free_bytes", lambda folder: 1000)
        refused("needs .* more, and .* free", hub)
    convert.load(NAME)
    stated = json.loads((convert.resolve(NAME) / "pull.json").read_text())
    assert stated["commit"] != hub.commit  # which is not here yet


@pytest.mark.parametrize(
    ("where", "status", "headers", "words"),
    [
        ("api", 404, {"X-Error-Code": "RepoNotFound"}, "has no model ships/small.*404.*check the name"),
        ("api", 401, {}, "has no model ships/small.*401.*HF_TOKEN"),
        ("api", 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "401.*HF_TOKEN"),
        (WEIGHTS, 403, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms at http.*HF_TOKEN"),
        (WEIGHTS, 401, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms at http.*HF_TOKEN"),
        (WEIGHTS, 404, {"X-Error-Code": "EntryNotFound"}, "404"),
        (WEIGHTS, 502, {}, "answered 502 for ships/small.*run the same command again"),
        ("api", 500, {}, "answered 500 for ships/small"),
    ],
)
@pytest.mark.parametrize("token", [None, SECRET])
def test_what_the_hub_refuses_is_one_line(hub, where, status, headers, words, token, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.failures[where] = status, headers
    message = refused(words, hub)
    if "HF_TOKEN" in message:
        assert ("put a token of yours" in message) == (token is None)


def test_the_token_goes_to_the_hub_and_not_to_the_storage(hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    fetch(hub, out=tmp_path / "out")
    sent = {(place, headers.get("authorization")) for place, _, headers in hub.requests}
    assert sent == {("hub", f"Bearer {SECRET}"), ("storage", None)}
    said = "".join(capsys.readouterr())
    assert SECRET not in said and not any(SECRET.encode() in content for content in files_of(tmp_path / "out").values())


def test_no_network_no_hub_and_no_address(hub, tmp_path, monkeypatch):
    with LoopbackHub({}) as gone:
        address = gone.url
    refused("no connection to 127.0.0.1.*check the network", endpoint=address)
    assert not (tmp_path / "cache").exists()  # nothing was begun
    hub.plain = True
    refused("does not answer as a Hugging Face hub does", hub)
    hub.plain, hub.hashes = False, False
    refused("does not answer as a Hugging Face hub does", hub)
    hub.hashes = True
    refused("is no address", endpoint="nowhere")
    refused("is no address", endpoint="http://[::1")
    refused("has no revision 'v9'", hub, revision="v9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("no connection.*offline", hub)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(package, "__version__", "0.36.0")
        refused(r"version 2 or newer: pip install 'twelve\[pull\]'")
    for name in ("huggingface_hub", "huggingface_hub.constants"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(r"pip install 'twelve\[pull\]'")


@pytest.mark.parametrize("name", ["../up", "/etc", "a/b/c", "a b", "", ".hidden", "a--b", "https://huggingface.co/a/b"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(InputError, match="is no name of a model"):
        pull(name, quiet=True)


def test_pickles_are_refused_by_name(hub):
    hub.files = {"config.json": hub.files["config.json"], "pytorch_model.bin": b"\x80\x04."}
    refused("weights as pickles only .pytorch_model.bin.*code", hub)
    refused("pytorch_model.bin is a pickle.*code.*never fetched", hub, file="pytorch_model.bin")
    assert not hub.asked("pytorch_model.bin")


def test_a_pickle_is_not_fetched_under_another_names_cover(hub, model, tmp_path):
    """Neither as a licence nor as a shard; a shard lies beside its index, as reading wants it."""
    hub.files["LICENSE.pkl"] = hub.files["NOTICE-1.bin"] = b"\x80\x04."
    fetch(hub, out=tmp_path / "out")
    assert not {"LICENSE.pkl", "NOTICE-1.bin"} & files_of(tmp_path / "out").keys()
    shards = files_of(model / "shards")
    for path in ("pytorch_model.bin", "sub/a.safetensors", "sub/config.json", "..", ".lock"):
        hub.files = shards | {path: b"\x80\x04."}
        hub.files[INDEX] = json.dumps({"weight_map": {"a": path, "b": WEIGHTS}}).encode()
        refused(f"ships/small: {INDEX} names '{path}', which is no safetensors file beside it", hub)
        assert not hub.asked(path)


def test_a_table_of_rows_comes_along(hub, tokenizer, tmp_path):
    network = Transformer(small_v3(tokenizer.vocab_size, 64, 2, 0, 1, 64, engram_vocab_size=53)).init_weights(0)
    convert.save(network, tokenizer, tmp_path / "memory", card=CARD)
    hub.files = files_of(tmp_path / "memory") | {"other.safetensors": b"not wanted"}
    fetch(hub, out=tmp_path / "out")
    assert files_of(tmp_path / "out").keys() == {*files_of(tmp_path / "memory"), "pull.json"}
    assert convert.load(tmp_path / "out")[0].memory.table.count == network.memory.table.count
    del hub.files[TABLE]
    refused("has no engram.safetensors: it is no whole model", hub)


def test_names_hashes_and_sizes_of_a_hub_are_not_believed(hub, monkeypatch, tmp_path):
    """A hash becomes part of a file's name here, and names of files stand in messages."""
    hub.files["\x1b[2Ja.gguf"] = b"GGUF"
    assert fetch(hub, out=tmp_path / "out")["files"] and "\x1b" not in refused("no GGUF file b", hub, file="b.gguf")
    said = hub.listing()
    for change in (
        {"blobId": "../../../../escape"}, {"blobId": 5}, {"lfs": {"sha256": "/" * 64, "size": 1, "pointerSize": 1}},
    ):  # fmt: skip
        with monkeypatch.context() as hostile:
            siblings = [one | change for one in said["siblings"]]
            hostile.setattr(hub, "listing", lambda siblings=siblings: said | {"siblings": siblings})
            refused("does not answer as a Hugging Face hub does", hub)
    monkeypatch.setattr(pull_module, "LARGEST_JSON", 100)
    refused("ships/small: config.json has .*, too much for what it is", hub, out=tmp_path / "new")
    assert len(hub.asked("config.json")) == 1  # the first call's


def test_a_model_that_cannot_be_read_costs_nothing(hub):
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps(config | {"model_type": "mamba"}).encode()
    refused("ships/small: config: unknown model_type 'mamba'.*no weights were fetched", hub)
    hub.files["config.json"] = b"[1]"
    refused("ships/small: config: this is not a JSON object.*no weights were fetched", hub)
    hub.files["config.json"] = json.dumps(config | {"quantization_config": {"quant_method": "awq"}}).encode()
    refused("'awq'.*no weights were fetched", hub)
    assert not hub.asked(WEIGHTS)
    hub.files = {"README.md": b"# nothing"}
    refused("has no config.json", hub)


def test_one_gguf_file_is_chosen(hub, tmp_path):
    hub.files = {"README.md": CARD.encode(), "q/a.gguf": b"GGUF a", "b.gguf": b"GGUF b", "tokenizer.json": b"{}"}
    refused("has 2 GGUF files, choose one with --file: q/a.gguf, b.gguf", hub)
    refused("has no GGUF file c.gguf; it has q/a.gguf, b.gguf", hub, file="c.gguf")
    result = fetch(hub, file="q/a.gguf")
    folder = tmp_path / "cache" / "twelve" / "models" / NAME
    assert files_of(folder).keys() == {"README.md", "a.gguf", "pull.json"} and result["model"] == str(folder / "a.gguf")
    assert convert.resolve(NAME) == folder / "a.gguf"
    hub.files["c-00001-of-00002.gguf"] = b"GGUF"
    refused("c-00001-of-00002.gguf is only a part of a model", hub, file="c-00001-of-00002.gguf")
    del hub.files["q/a.gguf"], hub.files["c-00001-of-00002.gguf"]
    assert fetch(hub, out=tmp_path / "only")["model"].endswith("only/b.gguf")
    hub.files["d-00001-of-00001.gguf"] = b"GGUF"  # the only part is the whole
    assert fetch(hub, out=tmp_path / "whole", file="d-00001-of-00001.gguf")["files"] == 2


def test_a_folder_of_something_else_is_not_touched(hub, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    refused("mine holds other files", hub, out=tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    refused("is a file", hub, out=tmp_path / "file")
    fetch(hub, out=tmp_path / "out")
    for other in ('{"name": "other/model"}', "[]", "{}"):
        (tmp_path / "out" / "pull.json").write_text(other)
        refused("holds another model", hub, out=tmp_path / "out")


def test_room_is_looked_for_before_the_weights_are_fetched(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(pull_module, "free_bytes", lambda path: 1000)
    refused("ships/small needs .* more, and .* has 1.00kB free: free some space", hub)
    assert not hub.asked(WEIGHTS)
    monkeypatch.undo()


def test_a_disk_that_fills_up_is_one_line(hub, monkeypatch, tmp_path):
    class Full(io.FileIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = builtins.open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", *rest, **named: (
        Full(path, mode) if mode == "ab" and ".model.safetensors" in str(path) else real(path, mode, *rest, **named)
    ))  # fmt: skip
    refused("no space left in .*out: free some, then run the same command again", hub, out=tmp_path / "out")


def test_the_verb_prints_and_a_missing_card_is_written(hub, capsys, tmp_path):
    del hub.files["README.md"], hub.files["tokenizer.json"]
    assert cli.main(["pull", NAME, "--endpoint", hub.url, "--out", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "no tokenizer.json" in result["note"] and result["licence"] == "not stated" and f"{NAME}: 100%" in err
    written = (tmp_path / "out" / "README.md").read_text()
    assert f"commit {hub.commit}" in written and card.front_matter(tmp_path / "out")["parent"] == [NAME]
