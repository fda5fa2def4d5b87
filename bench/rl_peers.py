"""Reinforcement learning beside TRL's GRPOTrainer: the same model folder, prompts, group and length, in turns.

    python bench/rl_peers.py --trl PYTHON [--sizes tiny small smollm2] [--rounds 3] [--steps 5] [--threads 2]
                             [--settings NAME] [--json FILE]
    python bench/rl_peers.py --trl PYTHON --trial [--sizes tiny]

PYTHON is the interpreter that has trl, transformers, accelerate, datasets and, for smollm2, peft. Every side is a
process of its own, loaded before the first round and stopped (SIGSTOP) whenever it is not its turn. A turn is one
unmeasured step, for cold caches, and then `--steps` measured ones; the sides take turns, another one first in each
round. Medians over the rounds, with the slowest and fastest.

    rollouts a minute  sampling alone. Ours: drawing problems, `Engine.generate` with log-probabilities, scores and
                       rewards. TRL: `_generate` alone (tokenise, generate, decode), without its rewards.
    steps a minute     from the end of a step to the end of the next: sampling, rewards, forward, backward, clipping,
                       AdamW. Neither side logs or saves.

Both write exactly 64 tokens an answer: the tokens that end one are drawn like any other and end nothing (ours: an empty
set of stops; TRL: an end that no vocabulary has, which costs it nothing). Temperature 1, beta 0, one update a rollout,
advantages by the group's deviation, token-level loss, clipping at 0.2 and 0.28, float32. The reward is a sum over the
answer's characters, so that random weights too have something to compare in every group; ours asks the task's scorer
besides. tiny and small: a Llama of random weights from a seed, trained whole. smollm2: that model in float32, through
adapters of rank 16 on all seven projections, on both sides. TRL's settings are the fastest of `--trial`.

Checked in every turn: answers, their tokens, prompts' token ids, optimiser steps, and that every group taught
something. The mean entropy of a token is shown: for the same policy it differs only by what was drawn.

The share of the peak counts what the step must compute, the same for both: each prompt once for sampling and once for
learning, though it may be computed for each of its answers, forward, and twice that for the backward pass (once where
weights stand still); against the best square float32 product of the same run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from peers import busy_seconds, cpu_seconds, processor

GROUP, TOKENS, LEVEL, SEED = 8, 64, 3, 0
TRIED = 2  # measured steps of a setting in a trial
SETS = 16  # steps after which the prompts come round again
RANK, ALPHA = 16, 32
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE, CLIP = 1e-6, (0.2, 0.28)
VOCABULARY, CONTEXT = 1024, 512
# prompts a step; width, layers, heads of a model of random weights; most steps a turn
SIZES = {
    "tiny": {"prompts": 24, "width": 128, "layers": 4, "heads": 4, "lora": 0, "steps": 99},
    "small": {"prompts": 24, "width": 256, "layers": 4, "heads": 4, "lora": 0, "steps": 99},
    "smollm2": {"prompts": 6, "lora": RANK, "steps": 1},
}
# of GRPOConfig, but for `rows`: answers a forward pass when learning, 0 for all of them at once; `threads`: fewer;
# `sdpa`: False for transformers' plain attention; `dtype`: of the weights; `env`: of the process
SETTINGS: dict[str, dict] = {
    "all rows at once": {},
    "96 rows": {"rows": 96},
    "48 rows": {"rows": 48},
    "24 rows": {"rows": 24},
    "8 rows": {"rows": 8},
    "48 rows, bf16": {"rows": 48, "bf16": True},
    "48 rows, weights in bf16": {"rows": 48, "bf16": True, "dtype": "bfloat16"},
    "48 rows, static cache": {"rows": 48, "cache_implementation": "static"},
    "8 rows, static cache": {"rows": 8, "cache_implementation": "static"},
    "48 rows, static cache, huge pages": {
        "rows": 48, "cache_implementation": "static", "env": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    },
    "48 rows, plain attention": {"rows": 48, "sdpa": False},
    "48 rows, compiled": {"rows": 48, "torch_compile": True},
    "48 rows, continuous batching": {"rows": 48, "use_transformers_continuous_batching": True},
    "48 rows, gradient checkpointing": {"rows": 48, "gradient_checkpointing": True},
    "48 rows, one thread": {"rows": 48, "threads": 1},
}  # fmt: skip
CHOSEN = {"tiny": "48 rows, static cache", "small": "48 rows, static cache", "smollm2": "8 rows, static cache"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", metavar="PYTHON", required=True, help="the interpreter that has trl")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a turn (smollm2: at most 1)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--settings", choices=SETTINGS, help="of TRL, for all sizes")
    parser.add_argument("--trial", action="store_true", help="time all settings of TRL on the first size, and end")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if min(options.rounds, options.steps, options.threads) < 1:
        parser.error("--rounds, --steps and --threads begin at 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nobody may stay behind, stopped
    with tempfile.TemporaryDirectory() as room:
        jobs = {size: make_job(size, options, Path(room) / size) for size in options.sizes[: options.trial or None]}
        if options.trial:
            trial(options, jobs[options.sizes[0]])
        else:
            rounds(options, jobs)


def rounds(options: argparse.Namespace, jobs: dict[str, dict]) -> None:
    """All turns, the table, the file."""
    print(f"{options.threads} threads of {os.cpu_count()} ({processor()}), {options.rounds} rounds")
    sides: list[Side] = []
    turns, peaks = [], []
    try:
        for job in jobs.values():
            sides += [Side("twelve", sys.executable, job), Side("TRL", options.trl, job)]
        for version in dict.fromkeys(side.about["version"] for side in sides):
            print(version)
        for number in range(options.rounds):
            print(f"round {number + 1}", file=sys.stderr)
            peaks.append(peak(options.threads))
            for name, job in jobs.items():
                there = [side for side in sides if side.job is job]
                for side in there[:: -1 if number % 2 else 1]:
                    turn = side.turn(1 + min(options.steps, SIZES[name]["steps"]))
                    check(side, turn, checked=[each for each in turns if each["size"] == name])
                    turns.append({"round": number, "size": name, "side": side.name, **turn})
    finally:
        for side in sides:
            side.end()
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "threads": options.threads, "peak_gflops": peaks, "settings": {name: jobs[name]["settings"] for name in jobs},
        "models": {name: {key: job[key] for key in ("parameters", "flops", "prompt_tokens", "rollouts")}
                   for name, job in jobs.items()},
        "turns": turns,
    }  # fmt: skip
    result["figures"] = report(result)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as out:
            json.dump(result, out, indent=2)


def check(side: Side, turn: dict, checked: list[dict]) -> None:
    """SystemExit when a step is not what it is measured as, or not what the other turns of that size did."""
    job = side.job
    for step in turn["steps"]:
        expected = {"rollouts": job["rollouts"], "tokens": job["rollouts"] * TOKENS, "updates": 1, "taught": 1.0,
                    "prompts": job["digests"][step["set"]]}  # fmt: skip
        if wrong := {key: (step[key], value) for key, value in expected.items() if step[key] != value}:
            raise SystemExit(f"{side.name}: a step did something else: {wrong}")
    if not any(each["side"] == side.name for each in checked):
        first = turn["steps"][0]
        print(f"{job['size']:8} {side.name:7} {first['rollouts']} answers, {first['tokens']:,} tokens, prompts "
              f"{first['prompts']}, {first['updates']} update")  # fmt: skip


def report(result: dict) -> list[dict]:
    """Print what was measured; once more as a list."""
    best, rows = max(result["peak_gflops"]), []
    shown = ", ".join(f"{one:.0f}" for one in result["peak_gflops"])
    print(f"\npeak {best:.0f} GFLOP/s (rounds: {shown})")
    print(f"{'median (slowest-fastest)':26}{'rollouts/min':>24}{'steps/min':>24}{'sampling':>10}{'learning':>10}"
          f"{'of peak':>9}{'peak of':>10}{'entropy':>9}")  # fmt: skip
    print(f"{'':26}{'':24}{'':24}{'s':>10}{'s':>10}{'':9}{'RAM, MB':>10}{'nats':>9}")
    for size, model in result["models"].items():
        print(f"{size}: {model['parameters']:,} parameters, {model['rollouts']} answers a step, prompts of "
              f"{model['prompt_tokens']:.0f} tokens; TRL: {result['settings'][size]['name']}")  # fmt: skip
        for side in ("twelve", "TRL"):
            turns = [turn for turn in result["turns"] if (turn["size"], turn["side"]) == (size, side)]
            sampling = [statistics.mean(step["sampling"] for step in turn["steps"][1:]) for turn in turns]
            whole = [statistics.mean(step["seconds"] for step in turn["steps"][1:]) for turn in turns]
            row = {
                "size": size, "side": side, "rollouts_a_minute": [60 * model["rollouts"] / one for one in sampling],
                "steps_a_minute": [60 / one for one in whole], "sampling_seconds": statistics.median(sampling),
                "step_seconds": statistics.median(whole),
                "share_of_peak": model["flops"] / statistics.median(whole) / 1e9 / best,
                "peak_memory": max(turn["memory"] for turn in turns),
                "entropy": statistics.mean(step["entropy"] for turn in turns for step in turn["steps"]),
            }  # fmt: skip
            rows.append(row)
            cells = "".join(f"{_spread(row[key]):>24}" for key in ("rollouts_a_minute", "steps_a_minute"))
            learning = row["step_seconds"] - row["sampling_seconds"]
            print(f"  {side:24}{cells}{row['sampling_seconds']:10.2f}{learning:10.2f}{row['share_of_peak']:9.1%}"
                  f"{row['peak_memory'] / 1e6:10,.0f}{row['entropy']:9.3f}")  # fmt: skip
        ours, theirs = rows[-2:]
        ratios = [statistics.median(ours[key]) / statistics.median(theirs[key])
                  for key in ("rollouts_a_minute", "steps_a_minute")]  # fmt: skip
        rows[-2]["ratios"] = ratios
        print(f"  {'twelve, times TRL':24}" + "".join(f"{ratio:>24.2f}" for ratio in ratios))
    if others := [turn["others"] for turn in result["turns"] if turn["others"] is not None]:
        print(f"other processes took {statistics.median(others):.2f} cores beside a turn (median; "
              f"worst {max(others):.2f})")  # fmt: skip
    return rows


def trial(options: argparse.Namespace, job: dict) -> None:
    """Every setting of TRL in a process of its own: one unmeasured step, then the measured ones."""
    print(f"{job['size']}, {options.threads} threads: rollouts and steps a minute, {TRIED} steps")
    for name in SETTINGS:
        side = None
        try:
            side = Side("TRL", options.trl, job | {"settings": settings(name)})
            steps = side.turn(1 + TRIED)["steps"][1:]
        except (OSError, RuntimeError) as error:
            print(f"{name:34}does not work: {error}")
            continue
        finally:
            if side:
                side.end()
        rates = 60 * job["rollouts"] * len(steps), 60 * len(steps)
        whole, sampling = (sum(step[key] for step in steps) for key in ("seconds", "sampling"))
        print(f"{name:34}{rates[0] / sampling:10,.0f}{rates[1] / whole:10.1f}", flush=True)


def _spread(values: list[float]) -> str:
    digits = 0 if min(values) >= 100 else 1
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


# --- what both sides get ----------------------------------------------------------------------------------------------


def make_job(size: str, options: argparse.Namespace, folder: Path) -> dict:
    """The model in `folder`, the prompts of every step, and what a step is to do."""
    import torch

    from twelve import convert, tasks
    from twelve.config import ModelConfig
    from twelve.data.tokenizer import Tokenizer
    from twelve.errors import InputError
    from twelve.evaluate.accuracy import prompt_ids
    from twelve.model import Transformer, count_parameters

    what = SIZES[size]
    problems = _problems(what["prompts"])
    if "width" in what:
        found = tasks.problems("arithmetic", "train", 1, range(1, 9))
        texts = ["\n".join(message["content"] for message in problem.messages()) for problem in islice(found, 2000)]
        pages = Path(__file__).resolve().parents[1].glob("docs/*.md")  # the task alone has few pairs
        words = Tokenizer.train([*texts, *(page.read_text(encoding="utf-8") for page in pages)], VOCABULARY)
        config = ModelConfig(
            model_type="llama", vocab_size=words.vocab_size, hidden_size=what["width"],
            intermediate_size=what["width"] * 11 // 4, num_hidden_layers=what["layers"],
            num_attention_heads=what["heads"], tie_word_embeddings=True, max_position_embeddings=CONTEXT,
        )  # fmt: skip
        model = Transformer(config).init_weights(SEED)
    else:
        try:
            model, words = convert.load(size, device="cpu", dtype=torch.float32)
        except InputError as error:
            raise SystemExit(f"{size}: {error}") from None
        config = model.config
    convert.save(model, words, folder)
    steps = [[prompt_ids(words, problem) for problem in step] for step in problems]
    return {
        "size": size, "folder": str(folder), "threads": options.threads, "lora": what["lora"],
        "prompts": what["prompts"], "rollouts": what["prompts"] * GROUP,
        "texts": [words.decode(prompt, skip_special=False) for step in steps for prompt in step],
        "digests": [digest(step) for step in steps],
        "prompt_tokens": statistics.mean(len(prompt) for step in steps for prompt in step),
        "parameters": count_parameters(config)["total"],
        "flops": statistics.mean(flops(config, [len(prompt) for prompt in step], what["lora"]) for step in steps),
        "settings": settings(options.settings or CHOSEN[size]),
    }  # fmt: skip


def settings(name: str) -> dict:
    return {"name": name, **SETTINGS[name]}


def _problems(prompts: int) -> list[list]:
    """Those of every step."""
    from twelve import tasks

    found = tasks.problems("arithmetic", "train", SEED, [LEVEL], ["en"])
    return [list(islice(found, prompts)) for _ in range(SETS)]


def digest(prompts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]


def reward(text: str) -> float:
    """Cheap, and hardly ever the same for a whole group."""
    return sum(map(ord, text)) % 997 / 996


def flops(config, lengths: list[int], lora: int) -> float:
    """A step's, at least: 2 a multiply-add, attention to as many tokens as there are, the head where a token is drawn.

    lengths: of the prompts, in tokens.
    """
    from twelve.model import count_parameters

    embedding = config.vocab_size * config.hidden_size
    body = count_parameters(config)["active"] - embedding * (1 if config.tie_word_embeddings else 2)
    pair = config.num_hidden_layers * config.num_attention_heads * 2 * config.head_dim
    read = TOKENS - 1  # the last token of an answer predicts nothing
    weights = sum(length + GROUP * read for length in lengths) * body + len(lengths) * GROUP * TOKENS * embedding
    pairs = sum(length**2 / 2 + GROUP * read * (length + read / 2) for length in lengths) * pair
    backward = (1 if lora else 2) * weights + 2 * pairs  # frozen weights need no gradient
    return 2 * (2 * (weights + pairs) + backward)


def peak(threads: int, size: int = 4096) -> float:
    """GFLOP/s of one square float32 product, the best of three."""
    import torch

    torch.set_num_threads(threads)
    a = torch.randn(size, size)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


# --- processes --------------------------------------------------------------------------------------------------------


class Side:
    """One side with one model in a process of its own, stopped except in its turns."""

    def __init__(self, name: str, python: str, job: dict) -> None:
        """RuntimeError with what it said last if it does not come up, OSError if there is no such program."""
        self.name, self.job = name, job
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`; a pipe would fill up)
        root = str(Path(__file__).resolve().parents[1])
        chosen = job["settings"] if name == "TRL" else {}
        threads = str(chosen.get("threads", job["threads"]))
        more = {"PYTHONPATH": root, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, __file__, "--side", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env=os.environ | more | chosen.get("env", {}),
        )  # fmt: skip
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            self.about = self._hear()
        except BaseException:
            self.end()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, steps: int) -> dict:
        """RuntimeError when it fails."""
        busy, own, began = busy_seconds(), cpu_seconds(self._process.pid), time.perf_counter()
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        turn = self._hear()
        self._process.send_signal(signal.SIGSTOP)
        turn["others"] = None
        if busy is not None:
            taken = busy_seconds() - busy - (cpu_seconds(self._process.pid) - own)
            turn["others"] = max(taken / (time.perf_counter() - began), 0.0)
        return turn

    def end(self) -> None:
        self._process.kill()  # also when it is stopped
        self._process.communicate()
        self._errors.close()

    def _hear(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        said = [text for text in self._errors.read().decode(errors="replace").splitlines() if text.strip()]
        raise RuntimeError((said or ["it ended without a word"])[-1].strip())


class Channel:
    """A side's end of the line: waits for a turn, and tells of its steps once they are done."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer

    def say(self, message: dict) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def wait(self) -> None:
        """For the next turn."""
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self._left, self._steps, self._began = int(line), [], time.perf_counter()

    def step(self, **figures) -> None:
        """One is done; with the turn's last one, wait."""
        now = time.perf_counter()
        self._steps.append({"seconds": now - self._began, **figures})
        self._began = now
        self._left -= 1
        if not self._left:
            import resource

            self.say({"steps": self._steps, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})
            self.wait()


class Rewards:
    """What `Reinforcement` asks for rewards."""

    def of(self, problem, text: str, score: float, tokens: int, max_tokens: int) -> float:
        return reward(text)


def ours(job: dict, channel: Channel) -> None:
    """`twelve rl`'s trainer, step by step."""
    import torch

    import twelve
    from twelve import convert, lora
    from twelve.heap import keep_freed_memory
    from twelve.posttrain.curriculum import Cell
    from twelve.posttrain.grpo import Objective
    from twelve.posttrain.reinforcement import Reinforcement
    from twelve.train.plan import Plan

    torch.set_num_threads(job["threads"])
    keep_freed_memory()
    given = _problems(job["prompts"])

    class Given(Reinforcement):
        def _problems(self, cells, purpose):
            return given[purpose % SETS if isinstance(purpose, int) else 0]

        def rollout(self):
            self.groups = super().rollout()
            return self.groups

        def update(self, rate: float, loss: float) -> float:
            self.updates += 1
            return super().update(rate, loss)

    model, words = convert.load(job["folder"], device="cpu", dtype=torch.float32)
    if job["lora"]:
        lora.attach(model, job["lora"], alpha=ALPHA, seed=SEED)
    words.stop_ids = set()
    plan = Plan(
        stage="rl", config=model.config.to_dict(), data={}, batch_size=job["rollouts"],
        micro_batch_size=job["rollouts"], context=model.config.max_position_embeddings, learning_rate=LEARNING_RATE,
        seed=SEED, threads=job["threads"], precision="float32", muon=False, weight_decay=0.0, warmup=1,
        options={"prompts": job["prompts"], "group": GROUP, "max_tokens": TOKENS, "temperature": 1.0, "memory": None,
                 "updates": 1, "curriculum": "uniform", "problems": 0},
    )  # fmt: skip
    objective = Objective(clip_low=CLIP[0], clip_high=CLIP[1], mask_overlong=False)
    cells = [Cell("arithmetic", LEVEL, "en")]
    trainer = Given(model, words, plan, Path(job["folder"]) / "run", cells, objective, Rewards())
    trainer.memory["before"] = []  # nothing is answered before and after
    trainer.begin()
    runner = type(trainer.engine.runner).__name__
    channel.say({"version": f"twelve {twelve.__version__}, {runner}, torch {torch.__version__}"})
    channel.wait()
    while True:
        at, trainer.updates = trainer.step % SETS, 0
        figures = trainer.train_step()
        channel.step(
            sampling=figures["sampling_seconds"], set=at, rollouts=sum(len(group.answers) for group in trainer.groups),
            tokens=sum(len(answer.token_ids) for group in trainer.groups for answer in group.answers),
            prompts=digest([group.prompt for group in trainer.groups]), updates=trainer.updates,
            taught=figures["kept"], entropy=figures["entropy"],
        )  # fmt: skip


def theirs(job: dict, channel: Channel) -> None:
    """`GRPOTrainer.train`, stopped at the end of its turns."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    from twelve.heap import keep_freed_memory  # for both sides alike

    chosen = {key: value for key, value in job["settings"].items() if key not in ("name", "threads", "env")}
    rows = chosen.pop("rows", 0) or job["rollouts"]
    plain = not chosen.pop("sdpa", True)
    dtype = chosen.pop("dtype", "float32")
    torch.set_num_threads(job["settings"].get("threads", job["threads"]))
    keep_freed_memory()
    rows = min(rows, job["rollouts"])
    accumulation = job["rollouts"] // rows

    class Timed(trl.GRPOTrainer):
        def _generate(self, prompts):
            began = time.perf_counter()
            out = super()._generate(prompts)
            self.sampling, self.sampled = time.perf_counter() - began, out
            return out

    class Turns(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            prompts, answers, *_ = trainer.sampled
            metrics = trainer._metrics["train"]
            channel.step(
                sampling=trainer.sampling, set=(state.global_step - 1) % SETS, rollouts=len(answers),
                tokens=sum(map(len, answers)), prompts=digest(prompts[::GROUP]),
                updates=state.global_step - self.before, taught=1 - metrics["frac_reward_zero_std"][-1],
                entropy=statistics.mean(metrics["entropy"][-accumulation:]),
            )  # fmt: skip
            self.before = state.global_step

        def on_train_begin(self, args, state, control, **_):
            self.before = 0
            channel.say({"version": f"trl {trl.__version__}, transformers {transformers.__version__}, "
                                    f"torch {torch.__version__}"})  # fmt: skip
            channel.wait()

    words = transformers.AutoTokenizer.from_pretrained(job["folder"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=getattr(torch, dtype), attn_implementation="eager" if plain else "sdpa"
    )
    adapters = None
    if job["lora"]:
        from peft import LoraConfig

        adapters = LoraConfig(r=job["lora"], lora_alpha=ALPHA, target_modules=ADAPTED, task_type="CAUSAL_LM")
    arguments = {
        "output_dir": job["folder"] + "/trl", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation, "num_generations": GROUP, "max_completion_length": TOKENS,
        "temperature": 1.0, "beta": 0.0, "num_iterations": 1, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "epsilon": CLIP[0], "epsilon_high": CLIP[1], "loss_type": "dapo",
        "scale_rewards": "group", "optim": "adamw_torch_fused", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "shuffle_dataset": False, "max_steps": 10**6, "logging_strategy": "no", "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
        "generation_kwargs": {"eos_token_id": [-1]}, "seed": SEED,
    }  # fmt: skip
    trainer = Timed(
        model=model, processing_class=words, peft_config=adapters, callbacks=[Turns()],
        reward_funcs=lambda completions, **_: [reward(text) for text in completions],
        args=trl.GRPOConfig(**arguments | chosen), train_dataset=Dataset.from_dict({"prompt": job["texts"]}),
    )  # fmt: skip
    trainer.eos_token_ids = [-1]  # what it looks for in the answers afterwards
    trainer.train()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        line = Channel()
        {"twelve": ours, "TRL": theirs}[sys.argv[2]](json.loads(sys.stdin.readline()), line)
    else:
        main()
