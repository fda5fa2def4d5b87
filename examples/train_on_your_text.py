"""Your own text into a small model, which then continues a sentence.

    python examples/train_on_your_text.py my-texts/ --minutes 10 --out runs/my-texts

Without paths it reads the few pages in examples/texts, which are enough to see how it goes, not to learn a language.
What it does is `twelve pretrain PATH... --minutes M --out FOLDER` and `twelve generate FOLDER "..."`.
"""

import argparse
from pathlib import Path

import twelve
from twelve.engine import Request, make_engine
from twelve.train.pretrain import pretrain

TEXTS = Path(__file__).with_name("texts")
BEGINNINGS = ["The harbour ", "항구는 "]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("paths", nargs="*", default=[str(TEXTS)], metavar="PATH", help=".txt, .md, .jsonl, or a folder")
parser.add_argument("--minutes", type=float, default=2)
parser.add_argument("--steps", type=int, help="optimiser steps, instead of --minutes")
parser.add_argument("--out", default="runs/my-texts")
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--begin", nargs="+", default=BEGINNINGS, metavar="TEXT", help="to be continued")
options = parser.parse_args()

# the same call again goes on where this one was stopped
pretrain(
    options.paths, options.out, minutes=None if options.steps else options.minutes, steps=options.steps,
    width=options.width, layers=4, experts=4, context=256, batch=8,
)  # fmt: skip

model, tokenizer = twelve.load(options.out)
engine = make_engine(model, tokenizer)
asked = [Request([*tokenizer.start_ids, *tokenizer.encode(text)], 40, 0.7, seed=1) for text in options.begin]
for text, answer in zip(options.begin, engine.generate(asked), strict=True):
    print(f"{text}{answer.text}\n")
