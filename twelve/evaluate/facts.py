"""What a model remembers: facts about invented people, places, events and books, in Korean and in English.

Nobody can know them beforehand. Every fact has five wordings: `documents` tells it in four of them, to be mixed into
the text that a model is trained on, and `recall` asks in the fifth, which other facts are told in. Who has learnt only
the words fails there, and is told apart by `as_told`: the same facts asked in a wording that they were told in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F

from twelve.engine.sampler import NOT_FINITE
from twelve.errors import InputError
from twelve.evaluate import fact_words as words
from twelve.evaluate.bits import Window, batches, padded
from twelve.files import atomic_write
from twelve.tasks import LANGUAGES
from twelve.tasks.korean import Noun

COUNT = 100  # facts a language, unless asked for another number
TIMES = 10  # that a file to train on repeats every sentence
KINDS = ("person", "place", "event", "book")
CHOICES = 20  # answers of a kind and language, all right equally often
LEAST = CHOICES * len(KINDS)  # facts a language: with fewer, some answers would be right nowhere, and guessing easier
NAMES = 5_000  # in a language


@dataclass(frozen=True)
class Fact:
    """One thing to remember. `choices` are the answers of its kind, of which `answer` is right."""

    language: str
    kind: str
    subject: str
    answer: str
    choices: tuple[str, ...]
    asked: int  # the wording that it is asked in, and never told

    def sentence(self, wording: int, answer: str | None = None) -> str:
        return self._fill(self._wordings[wording], answer or self.answer)

    def told(self) -> list[str]:
        """The sentences to learn it from."""
        return [self.sentence(wording) for wording in range(len(self._wordings)) if wording != self.asked]

    @property
    def prompt(self) -> str:
        """The wording asked in, up to the blank before the answer."""
        return self._fill(self._wordings[self.asked].split(" {a")[0], "")

    def completion(self, answer: str) -> str:
        """How the prompt would go on, were this the answer: a blank, the answer, the sentence's end."""
        return self.sentence(self.asked, answer)[len(self.prompt) :]

    @property
    def _wordings(self) -> tuple[str, ...]:
        return words.WORDINGS[self.language][self.kind]

    def _fill(self, wording: str, answer: str) -> str:
        text = wording.format(x=Noun(self.subject), a=Noun(answer))
        return text[:1].upper() + text[1:]


def facts(seed: int = 0, count: int = COUNT, languages: Sequence[str] = LANGUAGES) -> list[Fact]:
    """`count` facts in each language, the kinds in turn.

    InputError for fewer than LEAST, more than there are, or a language that has none.
    """
    if count < LEAST:
        raise InputError(f"{count} facts are too few: ask for at least {LEAST} a language")
    found = []
    for language in languages:
        if language not in words.WORDINGS:
            raise InputError(f"there are no facts in {language!r}, only in {', '.join(words.WORDINGS)}")
        draw = Random(f"facts {seed} {language}")
        names = _names(draw, language)
        subjects = {kind: _subjects(draw, language, kind, names) for kind in KINDS}
        choices = {kind: _choices(draw, language, kind, names) for kind in KINDS}
        answers = {kind: _in_turn(draw, choices[kind]) for kind in KINDS}
        for index in range(count):
            kind = KINDS[index % len(KINDS)]
            subject = next(subjects[kind], None)
            if subject is None:
                raise InputError(f"there are no {count:,} facts in a language: ask for fewer")
            asked = draw.randrange(len(words.WORDINGS[language][kind]))
            found.append(Fact(language, kind, subject, next(answers[kind]), choices[kind], asked))
    return found


def as_told(known: Sequence[Fact]) -> list[Fact]:
    """The same facts, asked in a wording that `known` are told in."""
    return [replace(fact, asked=(fact.asked + 1) % len(words.WORDINGS[fact.language][fact.kind])) for fact in known]


def documents(known: Sequence[Fact], times: int = 1, seed: int = 0) -> list[str]:
    """Every sentence that tells a fact, `times` times, each a document, in an order drawn from the seed."""
    sentences = [sentence for fact in known for sentence in fact.told()] * times
    Random(f"documents {seed}").shuffle(sentences)
    return sentences


def write_documents(path: str | Path, seed: int = 0, count: int = COUNT, languages: Sequence[str] = LANGUAGES) -> int:
    """Write the documents of `facts(seed, count, languages)`, TIMES over, as .jsonl; returns how many."""
    sentences = documents(facts(seed, count, languages), TIMES, seed)
    with atomic_write(path) as temporary:
        rows = (json.dumps({"text": sentence}, ensure_ascii=False) + "\n" for sentence in sentences)
        temporary.write_text("".join(rows), encoding="utf-8")
    return len(sentences)


def _subjects(draw: Random, language: str, kind: str, names: Iterator[str]) -> Iterator[str]:
    """Things that all differ, in the order drawn."""
    if kind == "book":
        form = "{} {}의 {}" if language == "ko" else "the {} {} of the {}"
        titles = [form.format(*parts) for parts in product(*(part.split() for part in words.TITLES[language]))]
        yield from draw.sample(titles, len(titles))
        return
    for name in names:
        yield draw.choice(words.EVENTS[language]).format(x=name) if kind == "event" else name


def _names(draw: Random, language: str) -> Iterator[str]:
    """Different ones, NAMES of them."""
    seen = set()
    while len(seen) < NAMES:
        name = "".join(draw.choice(parts.split()) for parts in words.NAMES[language]).title()
        if name not in seen:
            seen.add(name)
            yield name


def _choices(draw: Random, language: str, kind: str, names: Iterator[str]) -> tuple[str, ...]:
    if kind == "event":
        return tuple(str(year) for year in draw.sample(range(1000, 2000), CHOICES))
    if kind == "book":
        return tuple(islice(names, CHOICES))
    return tuple(words.ANSWERS[language][kind].split())


def _in_turn(draw: Random, choices: Sequence[str]) -> Iterator[str]:
    """All choices in a drawn order, again and again, so that none is right more often than others."""
    while True:
        yield from draw.sample(choices, len(choices))


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass
class Recall:
    """How many facts of a language a model knows."""

    language: str
    chosen: list[bool]  # of each fact: whether the right answer is likelier than the CHOICES - 1 others
    written: list[bool]  # of each: whether greedy decoding goes on with it
    kinds: dict[str, float]  # of each kind, the share that is chosen
    wording: str = ""  # that was asked in, where that is known

    def to_dict(self) -> dict[str, Any]:
        """Counts, and shares with their binomial standard error."""
        asked = len(self.chosen)
        row: dict[str, Any] = {"language": self.language, "asked": asked, "kinds": self.kinds, "chance": 1 / CHOICES}
        for name, each in (("chosen", self.chosen), ("written", self.written)):
            share = mean(each)
            row |= {name: sum(each), f"{name}_share": share, f"{name}_error": math.sqrt(share * (1 - share) / asked)}
        return row


@torch.inference_mode()
def recall(model, tokenizer, known: Sequence[Fact]) -> list[Recall]:
    """Ask every fact, alone in its context; a `Recall` for each language.

    The right answer is chosen if it makes the sentence likelier than any other of its kind, and written if greedy
    decoding gives it. InputError for a model whose context does not hold a sentence.
    """
    windows, needed = [], []
    for fact in known:
        prompt = [*tokenizer.start_ids, *tokenizer.encode(fact.prompt, control=False)]
        for answer in fact.choices:
            ids = tokenizer.encode(fact.completion(answer), control=False)
            windows.append(Window(len(windows), [*prompt, *ids], len(ids)))
            needed.append(_tokens_of(answer, ids, tokenizer))
    longest, context = max(len(window.ids) - 1 for window in windows), model.config.max_position_embeddings
    if longest > context:
        raise InputError(f"facts need a context of {longest} tokens, and the model has only {context}")
    nats, greedy = torch.zeros(len(windows)), torch.zeros(len(windows), dtype=torch.bool)
    for batch in batches(windows, model.config.vocab_size):
        for window, (loss, followed) in zip(batch, _judge(model, batch), strict=True):
            nats[window.document], greedy[window.document] = loss, followed >= needed[window.document]
    right = torch.tensor([fact.choices.index(fact.answer) for fact in known])
    chosen = (nats.view(-1, CHOICES).argmin(1) == right).tolist()
    written = greedy.view(-1, CHOICES)[torch.arange(len(known)), right].tolist()
    results = []
    for language in dict.fromkeys(fact.language for fact in known):
        mine = [number for number, fact in enumerate(known) if fact.language == language]
        kinds: dict[str, list[bool]] = {}
        for number in mine:
            kinds.setdefault(known[number].kind, []).append(chosen[number])
        shares = {kind: mean(found) for kind, found in kinds.items()}
        results.append(Recall(language, [chosen[n] for n in mine], [written[n] for n in mine], shares))
    return results


def _judge(model, batch: list[Window]) -> Iterator[tuple[float, int]]:
    """Of each window: nats of its scored tokens, and how many of them, from the first, greedy decoding gives."""
    ids, targets = padded(batch)
    device = next(model.parameters()).device
    logits, targets = model(ids.to(device)).float(), targets.to(device)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).sum(1)
    if not torch.isfinite(losses).all():
        raise InputError(NOT_FINITE)
    right = logits.argmax(-1) == targets
    for row, window in enumerate(batch):
        end = len(window.ids) - 1
        yield float(losses[row]), int(right[row, end - window.scored : end].int().cumprod(0).sum())


def _tokens_of(answer: str, ids: list[int], tokenizer) -> int:
    """How many of a completion's tokens it takes to write the answer; the last may hold more. InputError where not even
    all do."""
    for n in range(1, len(ids) + 1):
        if tokenizer.decode(ids[:n]).strip().startswith(answer):
            return n
    raise InputError(f"the tokenizer cannot write {answer!r}: facts cannot be asked of this model")


@contextmanager
def without_memory(model) -> Iterator[None]:
    """Meanwhile the Engram table is all zeros, for whatever runs the model. InputError where there is none."""
    memory = getattr(model, "memory", None)
    if memory is None:
        raise InputError("this model has no Engram memory to leave out")
    table = memory.table
    memory.create()
    try:
        yield
    finally:
        memory.table = table
