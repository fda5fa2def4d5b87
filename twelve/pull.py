"""The verb `pull`: a model's files from a Hugging Face repository, each checked. Nothing else in twelve downloads.

A file is fetched under a hidden name that carries its hash, and gets its own name when that hash is right; the next
call goes on where one was interrupted. config.json, which makes a folder a model, comes first, so that a model that
cannot be read costs nothing, and is put in place last. Pickles are never fetched: reading one can run code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from twelve.config import ModelConfig
from twelve.convert import load_config
from twelve.convert.card import front_matter, render
from twelve.convert.folder import PULLED, pulled_folder, pulled_name
from twelve.convert.huggingface import INDEX, PICKLES, SINGLE, TABLE, config_from
from twelve.errors import InputError
from twelve.files import FolderLock, atomic_write, command, free_bytes, read_json, write_json
from twelve.hub import Hub, Remote

CONFIG, CARD, TOKENIZER = "config.json", "README.md", "tokenizer.json"
BESIDE = {
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
}  # fmt: skip
TEXTS = re.compile(r"(?i)README\.md|(licen[cs]e|notice)[\w.-]*")
PART = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.gguf")  # of a model cut into several files
SPARE = 64 << 20  # bytes to leave free on the disk
LARGEST_JSON = 256 << 20  # bytes of what is read before the room on the disk is known


def pull(
    name: str, out: str | Path | None = None, revision: str = "main", endpoint: str | None = None,
    file: str | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Fetch the model `name`, like OWNER/MODEL, into `out`, by default where every verb finds it by its name.

    revision: a branch, tag or commit. endpoint: another address than huggingface.co. file: the one GGUF file to fetch,
    in place of safetensors. The same call again resumes, or checks what is there. The environment's HF_TOKEN is sent,
    where it is set, for models that are not open to all. Returns what was fetched. InputError for whatever goes wrong:
    files so far stay, for the next call, but for one with a wrong hash. KeyboardInterrupt says how to go on.
    """
    own = pulled_folder(name)
    if own is None:
        raise InputError(f"{name!r} is no name of a model: they are like OWNER/MODEL")
    folder = Path(out) if out is not None else own
    _check_folder(folder, name)
    hub = Hub(name, revision, endpoint)
    with FolderLock(folder), hub.explained(folder):
        listed = hub.files()
        stated = {"name": name, "revision": revision, "commit": hub.commit}
        if not (folder / PULLED).exists():  # so that the next call knows whose folder it is
            write_json(folder / PULLED, stated)
        gguf = _gguf(listed, file, name)
        wanted = [one for path, one in listed.items() if TEXTS.fullmatch(path) and Path(path).suffix not in PICKLES]
        if gguf is not None:
            model = folder / gguf.name
            wanted.append(gguf)
            _fetch(hub, wanted, folder, quiet)
            write_json(folder / PULLED, stated)
        else:
            model, config = folder, _json(hub, listed, CONFIG, folder)
            tables = [_one(listed, TABLE, name)] if _check_config(config, name).engram_layer_ids else []
            beside = [listed[path] for path in sorted(BESIDE & listed.keys())]
            wanted += [*beside, *tables, *_weights(hub, listed, folder)]
            hidden = listed[CONFIG].partial(folder)

            def hide() -> None:  # half of a revision is no model
                if config == folder / CONFIG and config.exists():
                    os.replace(config, hidden)
                else:
                    (folder / CONFIG).unlink(missing_ok=True)

            _fetch(hub, wanted, folder, quiet, hide)
            if hidden.exists():
                os.replace(hidden, folder / CONFIG)
            write_json(folder / PULLED, stated)
            wanted.append(listed[CONFIG])
            _sweep(folder, {one.name for one in wanted})
        if CARD not in listed:
            made = f"`{name}`, commit {hub.commit}, as it was fetched."
            with atomic_write(folder / CARD) as temporary:
                card = render(folder, made, verb="pull", config=load_config(model), parents=[name])
                temporary.write_text(card, encoding="utf-8")
    result = {
        "model": str(model), "files": len(wanted), "bytes": sum(one.size for one in wanted),
        "bytes_fetched": hub.fetched, "commit": hub.commit,
        "licence": ", ".join(front_matter(folder).get("license", ["not stated"])),
    }  # fmt: skip
    if gguf is None and TOKENIZER not in listed:
        result["note"] = f"there is no {TOKENIZER}, so that twelve can neither read nor write text with this model"
    return result | {"next": command("twelve", "chat", name if out is None and gguf is None else model)}


def _check_folder(folder: Path, name: str) -> None:
    """InputError for a folder with anything but this model in it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder with --out")
    if (folder / PULLED).exists():
        if pulled_name(folder) != name:
            raise InputError(f"{folder} holds another model: name another folder with --out")
    elif folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise InputError(f"{folder} holds other files: name a new folder with --out")


# --- what to fetch ----------------------------------------------------------------------------------------------------


def _one(listed: dict[str, Remote], path: str, name: str) -> Remote:
    if path not in listed:
        raise InputError(f"{name} has no {path}: it is no whole model")
    return listed[path]


def _json(hub: Hub, listed: dict[str, Remote], path: str, folder: Path) -> Path:
    """Where a file that describes the others lies, fetched first."""
    one = _one(listed, path, hub.name)
    if one.size > LARGEST_JSON:
        raise InputError(f"{hub.name}: {path} has {_size(one.size)}, too much for what it is")
    return _verified(hub, one, folder)


def _gguf(listed: dict[str, Remote], file: str | None, name: str) -> Remote | None:
    """The GGUF file to fetch: the one asked for, or the only one where there are no safetensors."""
    found = [path for path in listed if path.endswith(".gguf")]
    if file is not None:
        if Path(file).suffix in PICKLES:
            raise InputError(f"{file} is a pickle, and reading one can run code hidden in it: it is never fetched")
        if file not in found:
            raise InputError(f"{name} has no GGUF file {file}; it has {', '.join(found) or 'none'}")
        if PART.fullmatch(file):
            raise InputError(f"{file} is only a part of a model: twelve reads those that are one file")
        return listed[file]
    if SINGLE in listed or INDEX in listed or not found:
        return None
    if len(found) > 1:
        raise InputError(f"{name} has {len(found)} GGUF files, choose one with --file: {', '.join(found)}")
    return listed[found[0]]


def _check_config(path: Path, name: str) -> ModelConfig:
    try:
        return config_from(read_json(path))
    except InputError as error:
        raise InputError(f"{name}: {error} (no weights were fetched)") from error


def _weights(hub: Hub, listed: dict[str, Remote], folder: Path) -> list[Remote]:
    if SINGLE in listed:
        return [listed[SINGLE]]
    if INDEX in listed:
        index = read_json(_json(hub, listed, INDEX, folder))
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict):
            raise InputError(f"{hub.name}: {INDEX} has no weight_map")
        shards = sorted({str(shard) for shard in placed.values()})
        for shard in shards:
            if "/" in shard or not shard.endswith(".safetensors"):
                raise InputError(f"{hub.name}: {INDEX} names {shard!r}, which is no safetensors file beside it")
        return [_one(listed, shard, hub.name) for shard in shards] + [listed[INDEX]]
    pickles = [path for path in listed if Path(path).suffix in PICKLES]
    if not pickles:
        raise InputError(f"{hub.name} has no weights that twelve can read: neither safetensors nor GGUF")
    raise InputError(
        f"{hub.name} has its weights as pickles only ({pickles[0]}); these are never fetched, since reading one can "
        "run code hidden in it: look for a repository with safetensors or GGUF"
    )


# --- fetching ---------------------------------------------------------------------------------------------------------


def _fetch(
    hub: Hub, wanted: list[Remote], folder: Path, quiet: bool, hide: Callable[[], None] = lambda: None
) -> None:  # fmt: skip
    """Every file to its place, if there is room for all; `hide` is called before one changes that the model is made of.
    Says on Ctrl-C how far it came."""
    parts = [one.partial(folder) for one in wanted]
    have = sum(part.stat().st_size for part in parts if part.exists())
    lacking = sum(one.size for one in wanted if not (folder / one.name).exists()) - have
    free = free_bytes(folder)
    if lacking + SPARE > free:
        room = f"{_size(lacking)} more, and {folder} has {_size(free)} free"
        raise InputError(f"{hub.name} needs {room}: free some space, or name a folder on another disk with --out")
    total = sum(one.size for one in wanted)
    with tqdm(total=total, initial=have, desc=hub.name, unit="B", unit_scale=True, disable=quiet) as bar:
        try:
            for remote in wanted:
                found, place = _verified(hub, remote, folder, bar), folder / remote.name
                if found != place:
                    if not TEXTS.fullmatch(remote.path):
                        hide()
                    os.replace(found, place)
        except KeyboardInterrupt:
            done = f"{_size(bar.n)} of {_size(total)}"
            raise KeyboardInterrupt(f"{hub.name}: {done} are here; the same command goes on from there") from None


def _verified(hub: Hub, remote: Remote, folder: Path, bar: tqdm | None = None) -> Path:
    """Where the file lies, with the right hash: in its place if it was there, else under its hidden name."""
    place, partial = folder / remote.name, remote.partial(folder)
    if remote.is_right(place):
        if bar is not None:
            bar.update(remote.size)
        return place
    hub.fetch(remote, partial, bar)
    if not remote.is_right(partial):
        partial.unlink()
        what = f"{remote.path} came with another hash than {hub.name} states, and was removed"
        raise InputError(f"{what}: run the same command again; if that is no better, its source is damaged")
    return partial


def _sweep(folder: Path, kept: set[str]) -> None:
    """Remove weights and pieces of another revision."""
    for path in folder.iterdir():
        if path.name not in kept and (path.suffix in (".safetensors", ".part") or path.name == INDEX):
            path.unlink()


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")
