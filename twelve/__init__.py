"""twelve: DeepSeek's training and inference ideas on the machine you already have.

    model, tokenizer = twelve.load("runs/demo/model")
    logits = model(ids)                                  # [B, T] int64 -> [B, T, V]
    twelve.save(model, tokenizer, "elsewhere")
"""

__version__ = "0.1.0"
__all__ = ["load", "save"]


def __getattr__(name: str):
    # torch takes seconds to import, and `twelve --help` does not need it
    if name in __all__:
        from twelve import convert

        return getattr(convert, name)
    raise AttributeError(f"module 'twelve' has no attribute {name!r}")
