"""What `twelve plan` says against what `twelve pretrain` then does: seconds, most memory held, tokens.

    python bench/plan_check.py TEXT... [--requests 3,1GiB 10,2GiB 20,4GiB 60,16GiB] [--out runs/plan-check]

Every request is asked for and then run, as a user would, in processes of their own, one after the other. Time is to be
within 5% or 20 seconds, whichever is more, memory and tokens within 25%. Rows go to OUT/rows.jsonl, and a request that
is there already is not run again. Requests that cannot be met come last, with what is said of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import runs

REQUESTS = ("3,1GiB", "10,2GiB", "20,4GiB", "60,16GiB")
IMPOSSIBLE = (["--minutes", "0"], ["--minutes", "0.05"], ["--memory", "4096GiB"], ["--memory", "64MiB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", metavar="TEXT")
    parser.add_argument("--requests", nargs="+", default=list(REQUESTS), metavar="MINUTES,MEMORY")
    parser.add_argument("--threads", type=int, help="of the CPU (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path("runs/plan-check"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = runs.read_rows(options.out)
    threads = ["--threads", str(options.threads)] if options.threads else []
    for request in options.requests:
        job = {"request": request, "threads": options.threads}
        row = runs.row_of(job, rows)
        if row is None:
            row = job | compare(request, threads, options)
            runs.add_row(options.out, row)
        show(row)
    for asked in IMPOSSIBLE:
        said = verb(["plan", *options.text, *asked, *threads], expected=2)[0]
        print(f"{' '.join(asked)}: {said}")


def compare(request: str, threads: list[str], options: argparse.Namespace) -> dict:
    """Plan, run, and put both beside each other."""
    minutes, memory = request.split(",")
    asked = [*options.text, "--minutes", minutes, "--memory", memory, *threads, "--json"]
    told, _, _ = verb(["plan", *asked])
    folder = options.out / f"{minutes}-{memory}"
    shutil.rmtree(folder, ignore_errors=True)
    done, seconds, held = verb(["pretrain", *asked, "--out", str(folder)])
    plan, run = json.loads(told), json.loads(done)
    expected = plan["expected"]
    later = json.loads((folder / "training" / "plan.json").read_text())["outlook"]
    return {
        "plan": {name: expected[name] for name in ("seconds", "tokens", "bits_per_byte")}
        | {"memory": sum(expected["memory"].values())},
        "outcome": {"seconds": round(seconds, 1), "memory": held, "tokens": run["tokens"], "loss": run["loss"]},
        "shape": plan["shape"], "parameters": run["parameters"],
        "same_shape": all(expected[name] == later[name] for name in ("width", "layers", "experts", "vocab_size")),
    }  # fmt: skip


def verb(arguments: list[str], expected: int = 0) -> tuple[str, float, int]:
    """What a verb prints (to standard error when it is to fail), its seconds, and the most memory it held."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "twelve", *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE if expected else None, text=True)  # fmt: skip
    said = (process.stderr if expected else process.stdout).read()
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone
    if os.waitstatus_to_exitcode(status) != expected:
        raise SystemExit(f"twelve {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return said.strip(), time.monotonic() - began, usage.ru_maxrss * unit


def show(row: dict) -> None:
    plan, outcome = row["plan"], row["outcome"]
    print(f"{row['request']}: {row['shape']}" + ("" if row["same_shape"] else " (the run chose another shape)"))
    late = outcome["seconds"] - plan["seconds"]
    told = [("seconds", abs(late) <= max(0.05 * plan["seconds"], 20))]
    told += [(name, 0.75 <= outcome[name] / plan[name] <= 1.25) for name in ("memory", "tokens")]
    for name, kept in told:
        print(f"  {name:8} planned {plan[name]:15,.0f}  was {outcome[name]:15,.0f}  "
              f"{outcome[name] / plan[name]:6.2f}  {'within' if kept else 'OUTSIDE'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
