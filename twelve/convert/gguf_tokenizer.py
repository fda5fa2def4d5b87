"""A byte-level BPE tokenizer in the two ways of storing it: the metadata of a GGUF file, and a tokenizer.json."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from twelve.convert.gguf import GGUFFile
from twelve.convert.gguf_config import SPECIALS
from twelve.data.tokenizer import KNOWN_ENDS, Tokenizer
from twelve.errors import InputError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # values of tokenizer.ggml.token_type
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (  # letters with two cases, but for some that hardly occur
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗ"
    "ὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆ"
    "ﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DIGITS = "digits"  # every number character by itself
# tokenizer.ggml.pre: the regular expressions that cut text into words, one after another
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (),
    "smollm": (DIGITS,),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (rf"{WORDS}|\p{{N}}|{OTHERS}",)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (rf"{WORDS}|\p{{N}}{{1,3}}|{OTHERS}",)),
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{CASED}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$",
        "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}+",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}  # fmt: skip
GPT2 = ("gpt-2", "smollm")  # then as GPT-2 cuts, which is what ByteLevel does by itself
STOPS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")  # ends besides eos that no reader knows by name
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is taken whole, whatever the merges give


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The byte-level BPE tokenizer inside the file, with its special tokens and chat template.

    `InputError` for another kind of tokenizer, and for a way of cutting words that is not known: it would give token
    ids that look right and are wrong.
    """
    data, path = file.metadata, file.path
    kind, split = data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise InputError(f"{path}: tokenizer model {kind!r} is not supported, only byte-level BPE ('gpt2')")
    if not isinstance(split, str) or split not in SPLITS:
        raise InputError(f"{path}: pre-tokenizer {split!r} is unknown; known: {', '.join(SPLITS)}")
    try:
        tokens, kinds = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
        template = data.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise TypeError("the chat template is no text")
        merges = [tuple(merge.split(" ", 1)) for merge in data["tokenizer.ggml.merges"]]
        by_id = dict(enumerate(tokens))
        vocabulary = {token: index for index, token in by_id.items()}
        if len(vocabulary) < len(tokens):
            raise ValueError("a token is there twice")
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split in WHOLE_WORDS)
        backend = tokenizers.Tokenizer(bpe)
        for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
            chosen = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
            backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in chosen])
        special_ids = {key: data.get(f"tokenizer.ggml.{stored}_token_id") for key, stored in SPECIALS.items()}
        names = {key: by_id[index] for key, index in special_ids.items() if index is not None}
        stops = [data[key] for key in STOPS if data.get(key) in by_id]
        if data.get("tokenizer.ggml.add_bos_token", split in WHOLE_WORDS):
            first = names["bos"]
            backend.post_processor = processors.TemplateProcessing([first, "$A"], None, [(first, special_ids["bos"])])
    except Exception as error:  # tokenizers raises plain Exception for merges that its vocabulary lacks
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: the tokenizer is damaged ({reason})") from error
    backend.pre_tokenizer = _cutting(split)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer.from_json(backend.to_str(), chat_template=template, stop_ids=stops, **names)


def _cutting(split: str) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Digits(individual_digits=True) if pattern == DIGITS
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in SPLITS[split]
    ]  # fmt: skip
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in GPT2)])


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A GGUF file's keys for a tokenizer; ids up to `vocab_size` that it does not use are filled up.

    `InputError` for one that llama.cpp would read otherwise: no byte-level BPE, or cut by other rules than it knows.
    """
    content = json.loads(tokenizer.to_json())
    model, decoder = content["model"], content.get("decoder") or {}
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or model.get("byte_fallback"):
        raise InputError("a GGUF file needs a byte-level BPE tokenizer, and this model's is of another kind")
    split = _name_of(content)
    if bool(model.get("ignore_merges")) != (split in WHOLE_WORDS):
        raise InputError(f"llama.cpp merges words otherwise than this tokenizer (ignore_merges, {split})")
    first = tokenizer.prefix_ids
    if first not in ([], [tokenizer.bos_id]):
        raise InputError(f"this tokenizer begins every text with token {first[0]}; llama.cpp can only take bos_token")
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.add_bos_token": bool(first),
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    for key, stored in SPECIALS.items():
        values[f"tokenizer.ggml.{stored}_token_id"] = getattr(tokenizer, f"{key}_id")
    own = sorted(index for index in tokenizer.stop_ids - {tokenizer.eos_id} if tokens[index] not in KNOWN_ENDS)
    if len(own) > len(STOPS):
        raise InputError(f"this tokenizer ends texts with {len(own)} tokens of its own; a GGUF file names {len(STOPS)}")
    values |= dict(zip(STOPS, own, strict=False))
    return {key: value for key, value in values.items() if value is not None}


def _name_of(content: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json cuts text. Normalising is left out there, as in its own converter."""
    own = _steps(content.get("pre_tokenizer"))
    for name in SPLITS:
        known = tokenizers.Tokenizer(models.BPE())
        known.pre_tokenizer = _cutting(name)
        if own == _steps(json.loads(known.to_str())["pre_tokenizer"]):
            return name
    raise InputError(
        "llama.cpp has no name for how this tokenizer cuts text into words (pre_tokenizer in tokenizer.json); "
        f"known here: {', '.join(SPLITS)}"
    )


def _steps(cutting: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer as a list, in one spelling; where offsets begin changes no ids."""
    if cutting is None:
        return []
    if cutting.get("type") == "Sequence":
        return [step for part in cutting["pretokenizers"] for step in _steps(part)]
    step = {key: value for key, value in cutting.items() if key != "trim_offsets"}
    if isinstance(step.get("pattern"), dict) and "Regex" in step["pattern"]:
        step["pattern"] = step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")
    return [step]
