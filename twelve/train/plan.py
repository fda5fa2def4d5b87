"""What a run will do, fixed before its first step and kept in `training/plan.json`, so that a resume does the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twelve.data.shards import PackedData
from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError
from twelve.files import read_json, write_json


@dataclass
class Plan:
    """All that decides the weights of a run, given its data. Sizes in tokens, times in seconds."""

    stage: str  # "pretrain" or "sft"
    options: dict[str, Any]  # what the user asked for; a resume must ask for the same
    config: dict[str, Any]  # ModelConfig
    data: dict[str, Any]  # what the shards say of themselves
    context: int  # tokens a row
    batch_size: int  # rows an optimiser step
    micro_batch_size: int  # rows a forward pass
    learning_rate: float
    seed: int
    threads: int
    precision: str  # "float32", or "bfloat16" for mixed precision
    compile: bool = False
    muon: bool = True
    adamw_lr_scale: float = 3.0  # of the learning rate, for embedding, head, router and vectors (docs/lab.md)
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 20  # steps
    decay_share: float = 0.4
    drawn: int = 0  # entries of the vocabulary in a step's loss besides its targets; 0: all there are
    mtp_weight: tuple[float, float] = (0.3, 0.1)  # before and during the decay (V3 section 4.2)
    balance_weight: float = 1e-4
    bias_update_speed: float = 0.005  # V3's 0.001 is for 10,000s of steps; zero during the decay (V3: at the end)
    # [at_step, steps]: from at_step on the run is to end after `steps`. With --minutes, later entries correct the first
    # for the speed that was really seen; a resume replays them.
    revisions: list[tuple[int, int]] = field(default_factory=list)
    most_steps: int | None = None  # more would read the data too often
    outlook: dict[str, Any] = field(default_factory=dict)  # what was expected, where a plan chose the sizes
    complete: bool = False

    def steps(self, step: int) -> int:
        """The planned number of steps, as known at `step`."""
        return next(steps for at, steps in reversed(self.revisions) if at <= step)

    def in_decay(self, step: int) -> bool:
        return step >= self.steps(step) * (1 - self.decay_share)

    def save(self, folder: Path) -> None:
        write_json(folder / "training" / "plan.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan of an earlier run in `folder`, or None."""
        path = folder / "training" / "plan.json"
        if not path.exists():
            return None
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise InputError(f"{path} is not a plan of this version ({error}): use another folder") from error

    def check_options(self, stage: str, options: dict[str, Any], folder: Path) -> None:
        """InputError if a run in `folder` was started with other options than these."""
        if self.stage != stage:
            raise InputError(f"{folder} holds a {self.stage} run, not {stage}: use another folder")
        for key, value in options.items():
            before = self.options.get(key)
            if before != value:
                raise InputError(
                    f"{folder} holds a run with {key}={before!r}, not {value!r}: ask for the same to resume it, "
                    "or use another folder"
                )

    def check_data(self, data: PackedData, folder: Path) -> None:
        """InputError if `data` is not what the run in `folder` was planned for."""
        if self.data != describe(data):
            raise InputError(
                f"the data of the run in {folder} changed since it began: put it back, or use another folder"
            )


def holds_data(plan: Plan, shards: Path) -> bool:
    """Whether the run's own shards are whole: then it goes on with them, whatever became of what they were made of."""
    try:
        return describe(PackedData(shards)) == plan.data and Tokenizer.load(shards).vocab_size > 0
    except InputError:
        return False


def describe(data: PackedData) -> dict[str, Any]:
    """What tells one tokenised corpus from another."""
    return {"tokens": data.tokens, "bytes": data.bytes, "documents": data.documents, "sha256": data.sha256}
