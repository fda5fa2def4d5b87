"""What a folder's config.json says of its packed weights, both ways."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from torch import nn

from twelve.convert import fp8
from twelve.errors import InputError
from twelve.quantize import Form, forms_of, matrices, packable

METHOD = "twelve"  # quant_method


def check_method(entry: Any) -> None:
    """`InputError`, with the name of the method, for a `quantization_config` of weights that we cannot read."""
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if method == fp8.METHOD:
        fp8.block_size(entry)
    elif method != METHOD:
        raise InputError(
            f"config: quantised weights of the kind {method!r} (quantization_config) are not supported, only "
            "`twelve quantize`'s own and fp8 in blocks: use a BF16 folder or a GGUF file"
        )


def config_entry(model: nn.Module, plain: nn.Module) -> dict[str, Any] | None:
    """`quantization_config` for config.json, None for a float model. plain: the float model, on any device.

    The most common form is the rule; `exceptions` names the modules of another (null: floats).
    """
    forms = forms_of(model)
    if not forms:
        return None
    rule = Counter(forms.values()).most_common(1)[0][0]
    others = {name: forms.get(name) for name in packable(plain) if forms.get(name) != rule}
    exceptions = {name: form and _spelled(form) for name, form in others.items()}
    return {"quant_method": METHOD, **_spelled(rule), "exceptions": exceptions, "made_from": fingerprint(plain)}


def read_forms(entry: dict[str, Any], plain: nn.Module) -> dict[str, Form]:
    """The forms that `config_entry` wrote. `InputError` for any that cannot be, or that belong to another model."""
    try:
        rule, exceptions, known = _form(entry), entry.get("exceptions", {}), packable(plain)
        forms = {name: exceptions.get(name, rule) for name in known}
        forms = {name: form if isinstance(form, Form) else _form(form) for name, form in forms.items() if form}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"quantization_config: a value is missing or of the wrong type ({error!r})") from error
    if entry.get("made_from") != fingerprint(plain):
        raise InputError("quantization_config: the weights were packed for a model of another shape than this config's")
    for name, form in forms.items():
        for matrix in matrices(known[name]):
            form.check(matrix.shape[-1], f"quantization_config: {name}")
    return forms


def _spelled(form: Form) -> dict[str, Any]:
    return {"bits": form.bits, "group_size": form.group, "symmetric": form.symmetric}


def _form(values: dict[str, Any]) -> Form:
    return Form(values["bits"], values["group_size"], bool(values["symmetric"]))


def fingerprint(plain: nn.Module) -> str:
    """16 hexadecimal digits of SHA-256 over the names and shapes of a float model's parameters."""
    shapes = "\n".join(f"{name} {list(parameter.shape)}" for name, parameter in plain.named_parameters())
    return hashlib.sha256(shapes.encode()).hexdigest()[:16]
