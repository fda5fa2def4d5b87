"""Any generator of reasoning-gym (an extra), as its worker process sees it: `gym:NAME`. One level, its defaults.

It runs in a worker because some of its scorers evaluate what the model wrote. Only a full score counts: many of them
give half a point or more to a text that merely holds the answer, 5005 for 500.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from twelve.errors import InputError


def functions(name: str) -> dict[str, Callable]:
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(f"{name} needs reasoning-gym: pip install 'twelve[gym]'") from None
    from reasoning_gym.factory import DATASETS

    kind = name.removeprefix("gym:")
    if kind not in DATASETS:
        close = [known for known in sorted(DATASETS) if kind[:4] in known][:5] or sorted(DATASETS)[:5]
        raise InputError(f"reasoning-gym has no generator {kind!r}; there are {len(DATASETS)}, like {', '.join(close)}")

    @lru_cache(maxsize=4096)
    def entry(seed: int) -> tuple[Any, dict[str, Any]]:
        dataset = reasoning_gym.create_dataset(kind, seed=seed, size=1)
        return dataset, dataset[0]

    def about() -> dict[str, Any]:
        return {"levels": [1], "languages": ["en"], "system": None, "examples": [], "max_tokens": None, "scores": True}

    def generate(seed: int, level: int, language: str) -> dict[str, Any]:
        seed = zlib.crc32(f"{seed}".encode()) >> 1  # numpy, which some use, takes 32 bits; a rest would repeat itself
        made = entry(seed)[1]
        answer = made["answer"]
        return {
            "task": name, "language": "en", "level": 1, "question": made["question"], "steps": "",
            "answer": answer if isinstance(answer, int) else str(answer), "data": {"seed": seed}, "key": "",
        }  # fmt: skip

    def score(problem: dict[str, Any], text: str) -> float:
        from twelve.tasks.verify import final_answer

        answer = final_answer(text)
        dataset, made = entry(problem["data"]["seed"])
        return float(answer is not None and dataset.score_answer(answer, made) >= 1)

    return {"about": about, "generate": generate, "score": score}
