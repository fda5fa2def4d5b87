"""The log-likelihood of continuations, which choices are made by. A context with several is read once for all of them.

Text becomes tokens as in lm-eval, so that scores agree with it: white space that ends a context belongs to the
continuation, the two are encoded as one text, and what exceeds the context's own tokens is the continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from twelve.engine.sampler import NOT_FINITE
from twelve.errors import InputError
from twelve.evaluate.bits import LOGITS
from twelve.model.branches import Branches

ROW = 2048  # tokens of one forward pass, unless a single context and continuation have more

Pair = tuple[list[int], list[int]]  # ids of a context, one at least, and of its continuation, one at least


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation after its context."""

    nats: float  # its log-probability
    greedy: bool  # whether greedy decoding gives it


def encode_pairs(tokenizer, pairs: Sequence[tuple[str, str]], control: bool = False) -> list[Pair]:
    """Ids of contexts and continuations. An empty context is the token that begins a text. control: whether control
    tokens spelled out in the text are read as such. InputError for a tokenizer without a token that begins a text."""
    moved = [_moved(*pair) for pair in pairs]
    unique = list(dict.fromkeys(context for context, _ in moved))
    contexts = dict(zip(unique, tokenizer.encode_batch(unique, control), strict=True))
    wholes = tokenizer.encode_batch(["".join(pair) for pair in moved], control)
    return [
        _pair(tokenizer, contexts[context], whole, continuation, control)
        for (context, continuation), whole in zip(moved, wholes, strict=True)
    ]


def begun(tokenizer, ids: list[int]) -> list[int]:
    """Ids after what the tokenizer itself puts before any text; a chat template may have written it already."""
    own = tokenizer.prefix_ids
    return ids if ids[: len(own)] == own else own + ids


def first_id(tokenizer) -> int:
    """What stands before a text where nothing else does. InputError for a tokenizer that has nothing for that."""
    known = [token for token in (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.start_ids) if token is not None]
    if not known:
        raise InputError("the tokenizer has no token that begins a text: a first token cannot be scored")
    return known[0]


def fit(pairs: Sequence[Pair], context: int) -> list[Pair]:
    """The pairs, with contexts that are too long for a model of `context` tokens cut at their beginning. InputError for
    a continuation that is too long by itself."""
    for _, after in pairs:
        if len(after) > context:
            raise InputError(f"{len(after):,} tokens are more than the model's context of {context:,}")
    return [(before[-(context + 1 - len(after)) :], after) for before, after in pairs]


@torch.inference_mode()
def log_likelihoods(model, pairs: Sequence[Pair], unit: str = "choice") -> list[Likelihood]:
    """How likely each continuation is after its context. They must `fit` the model."""
    found: list[Likelihood | None] = [None] * len(pairs)
    with tqdm(total=len(pairs), unit=unit, desc="likelihood", leave=False) as bar:
        for row in _rows(pairs):
            numbers, inputs, positions, mask, states, targets = _packed(row, pairs)
            at = replace(model.positions(inputs.to(model.device), 0, positions.to(model.device)), mask=mask)
            hidden = model.hidden(inputs.to(model.device), at)[0][0]  # [T, D]
            nats, right = _judge(model, hidden[states.to(model.device)], targets)
            sizes = [len(pairs[number][1]) for number in numbers]
            for number, *parts in zip(numbers, nats.split(sizes), right.split(sizes), strict=True):
                found[number] = Likelihood(float(parts[0].sum()), bool(parts[1].all()))
            bar.update(len(numbers))
    return found


# --- text to ids ------------------------------------------------------------------------------------------------------


def _moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _pair(tokenizer, before: list[int], whole: list[int], continuation: str, control: bool) -> Pair:
    after = whole[len(before) :]
    if before and not after:  # they make one token together: encoded apart there is something to score
        after = tokenizer.encode(continuation, control)
    before = begun(tokenizer, before)
    if not before:
        first = [first_id(tokenizer)]
        before, after = first, after[1:] if after[:1] == first and len(after) > 1 else after
    if not after:
        raise InputError("an empty continuation has no likelihood")
    return before, after


# --- ids to likelihoods -----------------------------------------------------------------------------------------------

Row = list[tuple[list[int], list[int]]]  # contexts, each with the numbers of its pairs


def _rows(pairs: Sequence[Pair]) -> Iterator[Row]:
    """All pairs, those of one context together, in rows of about ROW tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (before, _) in enumerate(pairs):
        groups.setdefault(tuple(before), []).append(number)
    row: Row = []
    length = 0
    for context, numbers in groups.items():
        part: list[int] = []
        for number in sorted(numbers, key=lambda number: len(pairs[number][1])):  # less padding in attention
            more = len(pairs[number][1]) - 1  # the last token predicts nothing
            if row and length + more + (0 if part else len(context)) > ROW:
                yield row
                row, part, length = [], [], 0
            if not part:
                row.append((list(context), part))
                length += len(context)
            part.append(number)
            length += more
    if row:
        yield row


def _packed(row: Row, pairs: Sequence[Pair]) -> tuple[list[int], Tensor, Tensor, Branches, Tensor, Tensor]:
    """The row's pairs in their order, ids and positions [1, T], who sees whom, which states [N] predict the tokens of
    continuations, and these tokens [N]. The last id stands for padding (see `Branches`)."""
    order, ids, positions, states, targets = [], [], [], [], []
    for context, numbers in row:
        last = len(ids) + len(context) - 1
        ids += context
        positions += range(len(context))
        for number in numbers:
            after = pairs[number][1]
            states += [last, *range(len(ids), len(ids) + len(after) - 1)]
            ids += after[:-1]
            positions += range(len(context), len(context) + len(after) - 1)
            targets += after
        order += numbers
    mask = Branches([(len(context), [len(pairs[number][1]) - 1 for number in numbers]) for context, numbers in row])
    rows = torch.tensor([[*ids, 0], [*positions, 0]])[:, None]
    return order, *rows, mask, torch.tensor(states), torch.tensor(targets)


def _judge(model, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each target [N], and whether it is the likeliest token."""
    nats, right = [], []
    targets = targets.to(states.device)
    count = max(1, LOGITS // model.config.vocab_size)
    for some, wanted in zip(states.split(count), targets.split(count), strict=True):
        logits = F.linear(some, model.head_weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nats.append(-F.cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    nats = torch.cat(nats).cpu().double()
    if not torch.isfinite(nats).all():
        raise InputError(NOT_FINITE)
    return nats, torch.cat(right).cpu()
