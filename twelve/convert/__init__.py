"""Model folders and files of others: the only place that renames tensors."""

from twelve.convert.folder import (
    check_place,
    load,
    load_config,
    load_tokenizer,
    load_weights,
    open_parts,
    require_floats,
    resolve,
    save,
)

__all__ = [
    "check_place", "load", "load_config", "load_tokenizer", "load_weights", "open_parts", "require_floats", "resolve",
    "save",
]  # fmt: skip
