"""Scaling runs that were never made: of a machine and a text for which a known law holds."""

import numpy as np

from twelve.config import small_v3
from twelve.plan import cost, law

SPEED, REACHED = 100.0, 0.4  # GFLOP/s, and the share of it that these runs reach


def true_bits(active, total, tokens, sparse=0.25):
    size, read = np.log(active ** (1 - sparse) * total**sparse / 1e6), np.log(tokens / 1e7)
    return 0.8 + np.exp(0.1 - 0.2 * size - 0.15 * read - 0.03 * size * read)


def made_up(widths=(64, 128, 192, 256, 384), experts=(0, 8), noise=0.0, vocabularies=(4096, 8192),
            seconds=(60, 240, 960)):  # fmt: skip
    """Rows as in scaling.json."""
    draw, rows = np.random.default_rng(0), []
    for width in widths:
        for routed in experts:
            for vocabulary in vocabularies:
                layers = max(2, width // 64)
                config = small_v3(vocabulary, width, layers, routed, 2, 512)
                counts, work = cost.parameters(config), law.work(config, 512, 8)
                speed = REACHED * SPEED * 1e9 / work
                outside, per_token = counts.embedding + counts.head, 3.5 if vocabulary == 4096 else 4.0
                marks = []
                for duration in seconds:
                    tokens = speed * duration
                    bits = true_bits(counts.active - outside, counts.total - outside, tokens)
                    bits += draw.normal(0, noise)
                    marks.append({"seconds": duration, "tokens": tokens, "bits": {"ko": bits - 0.1, "en": bits + 0.1}})
                rows.append({
                    "width": width, "layers": layers, "experts": routed, "vocabulary": vocabulary, "batch": 8,
                    "rate": 4e-3, "threads": 1, "context": 512, "active": counts.active, "total": counts.total,
                    "outside": outside, "work": work, "bytes_per_token": per_token, "gflops": SPEED,
                    "tokens_per_second": speed, "marks": marks,
                })  # fmt: skip
    return rows
