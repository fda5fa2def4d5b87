"""Warm-up, stable, decay (arXiv 2404.06395): the stable part does not depend on when the run will end."""

from __future__ import annotations


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay_share: float) -> float:
    """Rate of step 0 .. steps - 1: linear rise over `warmup` steps, `peak`, linear fall over the last `decay_share`."""
    rise = (step + 1) / max(1, warmup)
    fall = (steps - step) / max(1.0, decay_share * steps)
    return peak * max(0.0, min(1.0, rise, fall))
