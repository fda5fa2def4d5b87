"""Byte-level BPE: trained here, or read from a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from twelve.data.chat import TEMPLATE
from twelve.data.sample import any_of, sample
from twelve.errors import InputError
from twelve.files import atomic_write, read_json, valid, write_json

END_OF_TEXT, TURN_START, TURN_END = CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # never shown as text
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # one token each, and part of the text
MIN_VOCAB_SIZE = 256 + len(CONTROL) + len(TAGS)
# special tokens that end an answer or a text in the models people load; a folder's own eos is added to these
KNOWN_ENDS = (END_OF_TEXT, TURN_END, "<|end_of_text|>", "<|eot_id|>")
SAMPLE_BYTES_PER_ENTRY = 2048


class Tokenizer:
    """Text to token ids and back. Threads may share it.

    Control tokens (`<|im_end|>` and its like) are recognised in text unless `control=False`, which spells them out as
    plain characters: use that for text that others wrote, or it could forge the end of a document or of a turn.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        stop_ids: Iterable[int] = (),
        config: dict[str, Any] | None = None,
    ):
        backend.no_truncation()  # a stored tokenizer may carry a training run's settings
        backend.no_padding()
        self._backend = backend
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.chat_template = chat_template
        self.config = config or {}  # what else tokenizer_config.json says
        self._added = backend.get_added_tokens_decoder()  # id -> token
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)  # highest id + 1: ids may have holes
        self.bos_id, self.eos_id, self.pad_id = (self.id_of(name) if name else None for name in self._names.values())
        ends = {self.id_of(token) for token in KNOWN_ENDS if token in self.control_tokens}
        self.stop_ids: set[int] = ends | {*stop_ids} | ({self.eos_id} - {None})

    # --- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        sample_bytes: int | None = None,
        model_max_length: int | None = None,
        progress: bool = False,
    ) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` entries (fewer where the text has too few repeated pairs).

        `texts` is read once. What is learnt from is an even sample of it, held in memory, of at most `sample_bytes`
        UTF-8 bytes (default: 2 KiB an entry; more was not seen to change bytes per token by more than 1%). The same
        texts always give the same tokenizer. InputError for a vocabulary that cannot hold all bytes and control tokens.
        """
        check_vocab_size(vocab_size)
        backend = tokenizers.Tokenizer(models.BPE())
        # llama.cpp's "smollm": digits one by one, else words as GPT-2 cuts them, so that Hangul words stay whole
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            max_token_length=48,  # bytes; no entry is spent on a ruler of a hundred dashes
            special_tokens=[*CONTROL, *TAGS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=progress,
        )
        kept = sample(texts, sample_bytes or SAMPLE_BYTES_PER_ENTRY * vocab_size, CONTROL + TAGS, progress)
        backend.train_from_iterator(kept, trainer)
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:  # the trainer declares all of them special
            token["special"] = token["content"] in CONTROL
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        config = {} if model_max_length is None else {"model_max_length": model_max_length}
        return cls(backend, bos=END_OF_TEXT, eos=END_OF_TEXT, pad=END_OF_TEXT, chat_template=TEMPLATE, config=config)

    @classmethod
    def from_json(cls, text: str, **options: Any) -> Tokenizer:
        """From the content of a tokenizer.json; `options` are those of the constructor (bos, eos, pad as tokens)."""
        return cls(_backend(text, "the tokenizer"), **options)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a Hugging Face folder: tokenizer.json and tokenizer_config.json; chat_template.jinja and
        generation_config.json where present. InputError for a missing or damaged file."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder} has no tokenizer.json: only folders with a fast tokenizer can be read")
        config = _object(folder / "tokenizer_config.json")
        try:
            backend = _backend(path.read_text(encoding="utf-8"), path)
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is damaged: {error}") from error
        _add_tokens(backend, config.get("added_tokens_decoder"))
        generation = folder / "generation_config.json"
        stops = _object(generation).get("eos_token_id") if generation.exists() else None
        stops = stops if isinstance(stops, list) else [stops]
        return cls(
            backend,
            bos=_token(config.get("bos_token")),
            eos=_token(config.get("eos_token")),
            pad=_token(config.get("pad_token")),
            chat_template=_chat_template(folder, config),
            stop_ids=[stop for stop in stops if isinstance(stop, int)],
            config=config,
        )

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
        folder = Path(folder)
        with atomic_write(folder / "tokenizer.json") as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self.config
        config |= {key: name for key, name in self._names.items() if name}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", config)

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every entry, added tokens too, and its id."""
        return self._backend.get_vocab()

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """Tokens that steer a model and are no text."""
        return frozenset(token.content for token in self._added.values() if token.special)

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds control tokens in text."""
        return any_of(self.control_tokens)

    @cached_property
    def stop_pattern(self) -> re.Pattern[str]:
        """Finds tokens that end an answer, as text."""
        return any_of({self.decode([index], skip_special=False) for index in self.stop_ids} - {""})

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """What templates know as bos_token, eos_token and pad_token."""
        return {key: name for key, name in self._names.items() if name}

    @cached_property
    def end_id(self) -> int | None:
        """The token after a document; `eos_id` may be the end of a turn instead."""
        ends = [token for token in (END_OF_TEXT, "<|end_of_text|>") if token in self.control_tokens]
        return self.id_of(ends[0]) if ends else self.eos_id

    @cached_property
    def start_ids(self) -> list[int]:
        """What stands before a document, so that its first token is predicted too: what the tokenizer itself would put
        there, else `end_id`, as GPT-2 does."""
        return self.prefix_ids or ([self.end_id] if self.end_id is not None else [])

    @cached_property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer itself puts before any text: Llama 3's begin of text; nothing in most."""
        return self._backend.encode("").ids[:1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides how documents and messages are encoded."""
        return hashlib.sha256(f"{self._backend.to_str()}\0{self.chat_template}".encode()).hexdigest()

    # --- text to ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str, control: bool = True) -> list[int]:
        """Token ids; nothing is added at either end. Half a surrogate pair, which is no character, becomes U+FFFD."""
        return self._reader(control).encode(valid(text), add_special_tokens=False).ids

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._bytes.values()), default=1) or 1

    def encode_batch(self, texts: Sequence[str], control: bool = True) -> list[list[int]]:
        """`encode` for many texts, on all cores (RAYON_NUM_THREADS limits them)."""
        batch = [valid(text) for text in texts]
        return [one.ids for one in self._reader(control).encode_batch_fast(batch, add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, from which `decode_bytes` makes the same bytes: what is no UTF-8 goes byte by byte, and
        control tokens are spelled out. Foreign tokenizers may normalise text, or lack some bytes and leave them out."""
        ids = []
        for part in re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
            escaped = len(part) == 1 and "\udc80" <= part <= "\udcff"
            ids += self._byte_ids[ord(part) - 0xDC00] if escaped else self.encode(part, control=False)
        return ids

    # --- ids to text --------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text, without control tokens unless asked; bytes that are no UTF-8 come out as U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of every token, control tokens too; ids beyond the vocabulary have none."""
        return b"".join(self._bytes.get(index, b"") for index in ids)

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """Token id -> its bytes."""
        if "ByteLevel" not in repr(self._backend.decoder):
            raise InputError("this tokenizer is not byte-level BPE: its tokens have no bytes of their own")
        table = {
            index: bytes(map(BYTE_OF.get, token)) if BYTE_OF.keys() >= set(token) else token.encode()
            for token, index in self._backend.get_vocab(with_added_tokens=False).items()
        }
        return table | {index: token.content.encode() for index, token in self._added.items()}

    @cached_property
    def _byte_ids(self) -> list[list[int]]:
        """Byte -> the one token that is this byte alone; SmolLM2, for one, lacks 21 of them."""
        found = (self.id_of(character) for character in sorted(BYTE_OF, key=BYTE_OF.get))
        return [[] if token is None else [token] for token in found]

    def _reader(self, control: bool) -> tokenizers.Tokenizer:
        return self._backend if control else self._plain

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A twin that reads control tokens as text. A switch on the one would race between threads."""
        twin = tokenizers.Tokenizer.from_str(self._backend.to_str())
        twin.encode_special_tokens = True
        return twin


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small: it needs {MIN_VOCAB_SIZE} entries, 256 for the bytes and "
            f"{MIN_VOCAB_SIZE - 256} for control tokens and tags"
        )


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: a visible character for each byte. Bytes that are visible in Latin-1 stand for themselves, the
    others, in order, for the characters from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _byte_characters()


# --- reading the files of others --------------------------------------------------------------------------------------


def _backend(text: str, where: str | Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library knows no narrower type
        raise InputError(f"{where} is damaged: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


def _token(entry: Any) -> str | None:
    """A token is stored as text, or as an object with its `content`."""
    entry = entry.get("content") if isinstance(entry, dict) else entry
    return entry if isinstance(entry, str) else None


def _add_tokens(backend: tokenizers.Tokenizer, listed: Any) -> None:
    """Older folders list added tokens, by id, in tokenizer_config.json alone."""
    if not isinstance(listed, dict):
        return
    entries = {int(index): entry for index, entry in listed.items() if index.isdecimal()}
    for index in sorted(entries):
        token = _token(entries[index])
        if token and backend.token_to_id(token) is None:
            flags = entries[index] if isinstance(entries[index], dict) else {}
            special = bool(flags.get("special", True))
            backend.add_tokens([AddedToken(token, special=special, normalized=bool(flags.get("normalized", False)))])


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """One text, a list of named ones (the one named default counts), or a file of its own, which wins."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    stored = config.get("chat_template")
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        stored = named.get("default", next(iter(named.values()), None))
    return valid(stored) if isinstance(stored, str) else None
