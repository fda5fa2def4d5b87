"""Model folders and files of others: the only place that renames tensors."""

from twelve.convert.folder import (
    load,
    load_config,
    load_tokenizer,
    load_weights,
    open_parts,
    require_floats,
    resolve,
    save,
)

__all__ = ["load", "load_config", "load_tokenizer", "load_weights", "open_parts", "require_floats", "resolve", "save"]
