"""lm-eval on a model folder: python -m twelve.evaluate.lm_eval run --model twelve --model_args pretrained=FOLDER ...

It is lm-eval's own command line with one more model, `twelve`. Requests become tokens as in lm-eval's `hf` backend, so
that both score alike. Needs an extra: pip install 'twelve[lm-eval]'.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from twelve.convert import load
from twelve.data.chat import render
from twelve.engine import Engine, Request, sub_seed
from twelve.errors import InputError
from twelve.evaluate.likelihood import begun, encode_pairs, first_id, fit, log_likelihoods

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    MISSING = "lm-eval is not installed: pip install 'twelve[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"twelve: error: {MISSING}")
    raise ImportError(MISSING) from error

MAX_TOKENS = 256  # of an answer, where the task does not say
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of that; the first counts


@register_model("twelve")
class TwelveLM(LM):
    """A folder, a .gguf file or the name of a model package, as lm-eval wants a model."""

    def __init__(self, pretrained: str, device: str | None = None, seed: int = 0, **_: Any) -> None:
        """seed: of what a task draws. Batch sizes and the like are left to us."""
        super().__init__()
        self.model, self.tokenizer = load(pretrained, device=device)
        if self.tokenizer is None:
            raise InputError(f"{pretrained} has no tokenizer")
        self.pretrained, self.seed = pretrained, int(seed)
        self.context = self.model.config.max_position_embeddings

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        pairs = encode_pairs(self.tokenizer, [request.args for request in requests], control=True)
        found = log_likelihoods(self.model, fit(pairs, self.context), "request")
        return [(one.nats, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Of whole texts, in windows that do not overlap, as lm-eval cuts them."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = begun(self.tokenizer, self.tokenizer.encode(request.args[0]))
            windows = get_rolling_token_windows(ids, first_id(self.tokenizer), self.context, context_len=1)
            pairs += map(make_disjoint_window, windows)
            owners += [number] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, log_likelihoods(self.model, pairs, "window"), strict=True):
            totals[owner] += found.nats
        return totals

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        made = [self._request(number, *request.args) for number, request in enumerate(requests)]
        return [completion.text for completion in self.engine.generate(made)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without a prompt for an answer the last message is the beginning of one, and its turn is left open."""
        text = render(self.tokenizer, chat_history, add_generation_prompt)
        if add_generation_prompt or chat_history[-1]["role"] != "assistant":
            return text
        said = chat_history[-1]["content"].lstrip()
        at = text.rindex(said.rstrip())
        return text[:at] + (said if text.startswith(said, at) else said.rstrip())

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.chat_template or ""

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained

    def _request(self, number: int, prompt: str, settings: dict[str, Any]) -> Request:
        """A prompt that leaves no room for the answer loses its beginning. InputError if all of it would go."""
        stop = settings.get("until") or []
        stop = [stop] if isinstance(stop, str) else [one for one in stop if one]  # an empty one would stop at once
        limit = int(next((settings[name] for name in LIMITS if settings.get(name)), MAX_TOKENS))
        if limit >= self.context:
            raise InputError(
                f"answers of {limit} tokens are asked for, and the context is {self.context}: name fewer, as in "
                f"--gen_kwargs max_gen_toks={self.context // 4}"
            )
        drawn = settings.get("do_sample") is not False
        ids = begun(self.tokenizer, self.tokenizer.encode(prompt))
        return Request(
            ids[-(self.context - limit) :], limit, float(settings.get("temperature") or 0.0) if drawn else 0.0,
            float(settings.get("top_p") or 1.0), sub_seed(self.seed, number), stop,
        )  # fmt: skip


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        sys.exit(f"twelve: error: {error}")


if __name__ == "__main__":
    main()
