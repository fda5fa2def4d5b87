"""The mathematics of the model; knows no files, no tokenizer, no devices but torch's."""

from twelve.model.transformer import Cache, Losses, Transformer, count_parameters

__all__ = ["Cache", "Losses", "Transformer", "count_parameters"]
