"""What models are worth: bits per byte of text that they have not seen, and right answers to problems, side by side.

    python examples/evaluate_models.py runs/mine smollm2 --text my-held-out/ --task arithmetic

Fewer bits are better; they do not depend on the tokenizer, so that models with different ones can be compared. A
difference counts when it is more than about twice its standard error. `twelve eval MODEL --text PATH --task NAME` does
this for one model.
"""

import argparse
from pathlib import Path

from twelve.evaluate.evaluate import evaluate

TEXTS = sorted(str(path) for path in Path(__file__).with_name("texts").glob("*-val.jsonl"))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="+", metavar="MODEL")
parser.add_argument("--text", nargs="+", default=TEXTS, metavar="PATH", help="held out (default: examples/texts)")
parser.add_argument("--task", nargs="+", default=[], metavar="NAME", help="arithmetic, countdown, mine.py, ...")
parser.add_argument("--problems", type=int, default=100, help="a task and language")
options = parser.parse_args()

rows = []
for model in options.models:
    found = evaluate(model, texts=options.text, tasks=options.task, problems=options.problems)
    for text in found["text"]:
        error = text["standard_error"]  # a single document has none
        figures = f"{text['bits_per_byte']:.3f}{'' if error is None else f' ± {error:.3f}'} bits a byte"
        rows.append((model, Path(text["path"]).name, figures))
    for task in found["tasks"]:
        figures = f"{task['accuracy']:.1%} ± {task['standard_error']:.1%} right"
        rows.append((model, f"{task['task']}, {task['language']}", figures))
print()
for row in rows:
    print("{:30} {:24} {}".format(*row))
