"""The engine beside llama.cpp and transformers: the same GGUF file, threads and machine, in turns.

    python bench/peers.py [--rounds 5] [--threads 2] [--files Q4_1=FILE ...] [--make-files DIR]
                          [--llama-python PYTHON] [--node DIR] [--json FILE]

Every side and file is a process of its own, loaded and warmed up before the first round and stopped (SIGSTOP) whenever
it is not its turn, so that one works at a time. A round is every measurement of every side once: all sides of a file
and measurement directly after one another, another one first in each round. Before each there is a short unmeasured
run of the same kind. Medians over the rounds, with the slowest and fastest.

    decode      tokens/s of one sequence, 128 tokens after the first one that follows a prompt of 16
    prefill     tokens/s of a prompt of 512, never seen before: 512 / time to the first token
    16 streams  tokens/s of all together, 32 tokens each after the first ones that follow prompts of 16

Ours is `Engine.generate`, greedy, prefix cache on but with random prompts, guesses (speculation) off: a random prompt
soon has a model repeat itself, and a guess would always be right. `generate` tells no times between, so decoding is
counted as the time for n + 1 tokens each less the time for 1 token each: prompts and first tokens cancel. Drawing,
detokenising and scheduling count. llama.cpp is driven through its C interface, without drawing anything: its loop of
n batches of one row a sequence, after the prompts, is timed by itself. It runs with batches of 512, mmap, flash
attention off and on (the faster counts, for every measurement), as a native build (llama-cpp-python, unified KV) and
as a prebuilt one (node-llama-cpp, which has no unified KV). transformers runs in float32 from the first file: its
forward pass with a cache and argmax, without `generate` around it.

The machine's bandwidth is what `numpy.max` reads of 256 MiB, half of it in each of two threads (one part a thread),
best of eight passes each round. GB/s of a side: tokens/s of decode x the bytes of weights that a token needs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROMPT, PREFILL, STREAMS, BATCH = 16, 512, 16, 512
CELLS = 2048  # tokens that the cache of each side holds
COUNTS = {"decode": 128, "prefill": PREFILL, "streams": 32}  # tokens of a sequence
WARM = {"decode": 8, "prefill": 64, "streams": 4}
TITLES = {"decode": "decode", "prefill": f"prefill {PREFILL}", "streams": f"{STREAMS} streams"}
OURS, TRANSFORMERS = "twelve", "transformers float32"
REQUANTISED = {"Q4_0": 2, "Q8_0": 7}  # llama.cpp's numbers of the file types
BUFFER = 256 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--files", nargs="+", default=["Q4_1=smollm2"], metavar="NAME=FILE",
                        help="GGUF files or names of models; transformers gets the first")  # fmt: skip
    parser.add_argument("--make-files", metavar="DIR", help="also requantise the first file there, to Q4_0 and Q8_0")
    parser.add_argument("--llama-python", metavar="PYTHON", default=sys.executable,
                        help="the interpreter that has llama-cpp-python")  # fmt: skip
    parser.add_argument("--node", metavar="DIR", help="the folder whose node_modules holds node-llama-cpp")
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    from twelve.convert import resolve
    from twelve.errors import InputError

    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads begin at 1")
    if wrong := [one for one in options.files if not all(one.partition("="))]:
        parser.error(f"--files: {wrong[0]} is not NAME=FILE")
    try:
        files = {name: resolve(value) for name, _, value in (one.partition("=") for one in options.files)}
    except InputError as error:
        parser.error(str(error))
    if options.make_files:
        files |= requantise(options.llama_python, next(iter(files.values())), Path(options.make_files))

    peers: list[Peer] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nobody may stay behind, stopped
    try:
        for name, file in files.items():
            peers += start(options, name, file, first=not peers)
        turns(options, files, peers)
    finally:
        for peer in peers:
            peer.end()


def start(options: argparse.Namespace, name: str, file: Path, first: bool) -> list[Peer]:
    """All sides of one file that can run here, stopped. A side that cannot is named with the reason, and left out."""
    me, threads = str(Path(__file__).resolve()), str(options.threads)
    wanted = [(OURS, [sys.executable, me, "--side", "Ours", str(file), threads, "0"])]
    for flash, title in (("0", "flash off"), ("1", "flash on")):
        command = [options.llama_python, me, "--side", "Llama", str(file), threads, flash]
        wanted.append((f"llama.cpp native, {title}", command))
        if options.node:
            command = ["node", str(Path(me).with_suffix(".mjs")), options.node, str(file), threads, flash]
            wanted.append((f"llama.cpp prebuilt, {title}", command))
    if first and not options.without_transformers:
        wanted.append((TRANSFORMERS, [sys.executable, me, "--side", "Transformers", str(file), threads, "0"]))
    if first and not options.node:
        print("skipped: llama.cpp prebuilt (no --node)")
    peers = []
    for side, command in wanted:
        try:
            peers.append(Peer(side, name, command))
        except (OSError, RuntimeError) as error:
            if side == OURS:
                raise SystemExit(f"{side}, {name}: {error}") from None
            print(f"skipped: {side}, {name}: {error}")
    return peers


def turns(options: argparse.Namespace, files: dict[str, Path], peers: list[Peer]) -> None:
    """The rounds, the table, the file."""
    print(f"{options.threads} threads of {os.cpu_count()} ({processor()}), {options.rounds} rounds")
    for version in dict.fromkeys(peer.about["version"] for peer in peers):
        print(version)
    runs: list[dict] = []
    bandwidths = []
    for turn in range(options.rounds):
        print(f"round {turn + 1}", file=sys.stderr)
        bandwidths.append(bandwidth(options.threads))
        for file in files:
            there = [peer for peer in peers if peer.file == file]
            shift = turn % len(there)
            for measurement in TITLES:
                for peer in there[shift:] + there[:shift]:
                    if peer not in peers or measurement not in peer.about["measurements"]:
                        continue
                    try:
                        runs.append({"round": turn, **peer.measure(measurement)})
                    except RuntimeError as error:
                        if peer.side == OURS:
                            raise SystemExit(f"{OURS}, {peer.file}, {error}") from None
                        print(f"left out from round {turn + 1} on: {peer.side}, {peer.file}: {error}")
                        peers.remove(peer)
                        peer.end()
    runs = [run for run in runs if any((run["side"], run["file"]) == (peer.side, peer.file) for peer in peers)]
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "threads": options.threads, "bandwidth_gb_per_second": bandwidths,
        "files": {name: path.stat().st_size for name, path in files.items()},
        "sides": [{"side": peer.side, "file": peer.file, "memory": peer.memory(), "idle_cores": peer.idle,
                   **peer.about} for peer in peers],
        "runs": runs,
    }  # fmt: skip
    result |= report(result)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as out:
            json.dump(result, out, indent=2)


def report(result: dict) -> dict:
    """Print what was measured; medians and ratios once more as a dict."""
    figures: dict[tuple[str, str, str], list[float]] = {}
    for run in result["runs"]:
        figures.setdefault((run["file"], run["side"], run["measurement"]), []).append(run["tokens_per_second"])
    medians = {key: statistics.median(values) for key, values in figures.items()}

    def fastest(measurement: str, file: str | None = None, start: str = "llama.cpp") -> tuple[str, str, str] | None:
        keys = [key for key in medians if key[2] == measurement and key[1].startswith(start) and file in (None, key[0])]
        return max(keys, key=medians.get, default=None)

    print(f"\n{'tokens/s: median (slowest-fastest)':42}" + "".join(f"{title:>26}" for title in TITLES.values()))
    for one in result["sides"]:
        cells = [figures.get((one["file"], one["side"], measurement)) for measurement in TITLES]
        shown = ("-" if not c else f"{statistics.median(c):,.0f} ({min(c):,.0f}-{max(c):,.0f})" for c in cells)
        print(f"{one['file']:8}{one['side']:34}" + "".join(f"{cell:>26}" for cell in shown))

    ratios: dict[str, dict] = {}
    print(f"\n{'twelve, times as fast as':42}" + "".join(f"{title:>26}" for title in TITLES.values()))
    for file in result["files"]:
        for against, find in {
            "llama.cpp's fastest on the same file": lambda measurement, file=file: fastest(measurement, file),
            "llama.cpp's fastest on any file": fastest,
            "transformers": lambda measurement: fastest(measurement, start=TRANSFORMERS),
        }.items():
            row = {measurement: medians[file, OURS, measurement] / medians[key]
                   for measurement in TITLES if (key := find(measurement))}  # fmt: skip
            ratios.setdefault(file, {})[against] = row
            shown = (f"{row[measurement]:.2f}" if measurement in row else "-" for measurement in TITLES)
            print(f"{file:6}{against:36}" + "".join(f"{cell:>26}" for cell in shown))
    for measurement, title in TITLES.items():
        if key := fastest(measurement):
            print(f"llama.cpp's fastest, {title}: {key[1]}, {key[0]}: {medians[key]:,.0f} tokens/s")

    peak = max(result["bandwidth_gb_per_second"])
    print(f"\nbandwidth {peak:.1f} GB/s (numpy.max over {BUFFER >> 20} MiB, {result['threads']} threads; "
          f"rounds: {', '.join(f'{one:.1f}' for one in result['bandwidth_gb_per_second'])})")  # fmt: skip
    print(f"{'reading weights while decoding; memory':42}{'GB/s':>8}{'share':>8}{'MB a token':>12}"
          f"{'imports MB':>12}{'+ loading':>11}{'+ running':>11}{'x file':>8}")  # fmt: skip
    reading = []
    sizes = {one["file"]: one["bytes_a_token"] for one in result["sides"] if one["side"] == OURS}
    for one in result["sides"]:
        size = one.get("bytes_a_token", sizes[one["file"]])
        speed = medians[one["file"], one["side"], "decode"] * size / 1e9
        reading.append({"side": one["side"], "file": one["file"], "gb_per_second": speed, "share": speed / peak})
        print(f"{one['file']:8}{one['side']:34}{speed:8.1f}{speed / peak:8.0%}{size / 1e6:12.1f}", end="")
        if memory := one["memory"]:
            imports, loaded, end = memory["imported"], memory["loaded"], memory["at_the_end"]
            share = (end - imports) / result["files"][one["file"]]
            print(f"{imports / 1e6:12.0f}{(loaded - imports) / 1e6:11.0f}{(end - loaded) / 1e6:11.0f}", end="")
            print(f"{share:8.2f}", end="")
        print()
    cache = next(one["cache_bytes"] for one in result["sides"] if one["side"] == OURS) / 1e6
    print(f"x file: what came after the imports, the cache for {CELLS:,} tokens included: {cache:.0f} MB in float32 "
          f"(twelve), {cache / 2:.0f} MB in float16 (llama.cpp)")  # fmt: skip
    idle = max(result["sides"], key=lambda one: one["idle_cores"])
    print(f"left running between its turns a side takes up to {idle['idle_cores']:.2f} cores ({idle['side']}); "
          "all are stopped then")  # fmt: skip
    if others := [run["others"] for run in result["runs"] if run["others"] is not None]:
        print(f"other processes took {statistics.median(others):.2f} cores beside a measurement (median; "
              f"worst {max(others):.2f})")  # fmt: skip
    named = [dict(zip(("file", "side", "measurement"), key, strict=True), tokens_per_second=value)
             for key, value in medians.items()]  # fmt: skip
    return {"medians": named, "ratios": ratios, "reading": reading}


# --- processes --------------------------------------------------------------------------------------------------------


class Peer:
    """One side with one file in a process of its own, stopped except while it is asked for something."""

    def __init__(self, side: str, file: str, command: list[str]) -> None:
        """RuntimeError with what it said last if it does not come up, OSError if there is no such program."""
        self.side, self.file = side, file
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`; a pipe would fill up)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | {"PEERS_SIZES": json.dumps(SIZES)},
        )  # fmt: skip
        try:
            self._hear()
            self._bare = resident(self._process.pid)
            self._hear()
            self._loaded = resident(self._process.pid)
            self.about = {"measurements": list(TITLES), **self._hear()}
            time.sleep(0.3)  # threads may spin for a while
            before, began = cpu_seconds(self._process.pid), time.perf_counter()
            time.sleep(0.5)
            self.idle = (cpu_seconds(self._process.pid) - before) / (time.perf_counter() - began)
        except BaseException:
            self.end()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def measure(self, measurement: str) -> dict:
        """RuntimeError when it fails."""
        pid = self._process.pid
        busy, own, began = busy_seconds(), cpu_seconds(pid), time.perf_counter()
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(measurement + "\n")
            self._process.stdin.flush()
            value = self._hear()["value"]
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"{measurement}: {error}") from None
        self._process.send_signal(signal.SIGSTOP)
        others = None
        if busy is not None:
            taken = busy_seconds() - busy - (cpu_seconds(pid) - own)
            others = max(taken / (time.perf_counter() - began), 0.0)
        return {"side": self.side, "file": self.file, "measurement": measurement, "tokens_per_second": value,
                "others": others}  # fmt: skip

    def memory(self) -> dict | None:
        now = resident(self._process.pid)
        return now and {"imported": self._bare, "loaded": self._loaded, "at_the_end": now}

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
        said = self._errors.read().decode(errors="replace").splitlines()
        named = [text for text in said if "Error" in text]  # before a stack, or after it
        named = named or [text for text in said if text.strip()] or ["it ended without a word"]
        raise RuntimeError(named[-1].strip())


def resident(pid: int) -> int | None:
    """Bytes of memory, or None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None


def cpu_seconds(pid: int) -> float:
    """Of all its threads; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float | None:
    """Of all processes, and what a host took away; None where the system does not tell."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def bandwidth(threads: int) -> float:
    """GB/s that all threads read together."""
    import numpy as np

    buffer = np.ones(BUFFER // 8, np.uint64)
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        return max(BUFFER / seconds(lambda: list(pool.map(np.max, parts))) / 1e9 for _ in range(8))


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def requantise(python: str, file: Path, folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: folder / f"requantised-{name}.gguf" for name in REQUANTISED}
    for name, target in made.items():
        command = [python, __file__, "--requantise", str(file), str(target), str(REQUANTISED[name])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{target} could not be made: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    return made


# --- sides: each in a process that may have another interpreter, so what they need is imported there -----------------

SIZES = {"prompt": PROMPT, "prefill": PREFILL, "streams": STREAMS, "batch": BATCH, "cells": CELLS, "counts": COUNTS,
         "warm": WARM}  # fmt: skip


def serve(side, file: str, threads: int, flash: bool) -> None:
    """Load and warm up, then answer the measurements named on stdin with JSON lines on what stdout was."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(message: dict) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    made = side()
    say({"imported": True})
    made.load(file, threads, flash)
    say({"loaded": True})
    offered = [name for name in TITLES if hasattr(made, name)]
    for name in offered:
        getattr(made, name)(WARM[name])
    say({"measurements": offered, **made.about()})
    for line in sys.stdin:
        measurement = getattr(made, line.strip())
        measurement(WARM[line.strip()])  # after another side's turn the caches are cold
        say({"value": measurement(COUNTS[line.strip()])})


def prompt(length: int) -> list[int]:
    return [random.randrange(100, 40000) for _ in range(length)]


class Ours:
    """`Engine.generate`."""

    def __init__(self) -> None:
        import torch

        import twelve.convert
        import twelve.engine

        self.torch, self.twelve = torch, twelve

    def load(self, file: str, threads: int, flash: bool) -> None:
        self.torch.set_num_threads(threads)
        self.model, tokenizer = self.twelve.convert.load(file, device="cpu", packed=True)
        c = self.model.config
        token = 2 * 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # bytes of keys and values
        self.cache_bytes = CELLS * token
        self.engine = self.twelve.engine.Engine(
            self.model, tokenizer, kv_memory=self.cache_bytes, prefill_chunk=BATCH, speculation="off"
        )

    def about(self) -> dict:
        size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        if not self.model.config.tie_word_embeddings:  # then the embedding is only looked up
            size -= sum(tensor.nbytes for tensor in self.model.embed_tokens.state_dict().values())
        runner = type(self.engine.runner).__name__
        version = f"twelve {self.twelve.__version__}, {runner}, torch {self.torch.__version__}"
        return {"version": version, "bytes_a_token": size, "cache_bytes": self.cache_bytes}

    def prefill(self, count: int) -> float:
        return count / self._seconds(1, count, 1)

    def decode(self, count: int) -> float:
        return self._decoding(1, count)

    def streams(self, count: int) -> float:
        return self._decoding(STREAMS, count)

    def _decoding(self, sequences: int, count: int) -> float:
        prompts = self._seconds(sequences, PROMPT, 1)
        return sequences * count / (self._seconds(sequences, PROMPT, count + 1) - prompts)

    def _seconds(self, sequences: int, length: int, count: int) -> float:
        requests = [
            self.twelve.engine.Request(prompt(length), max_tokens=count, temperature=0.0, stop_ids=frozenset())
            for _ in range(sequences)
        ]
        began = time.perf_counter()
        completions = self.engine.generate(requests)
        taken = time.perf_counter() - began
        if any(len(one.token_ids) != count or one.cached_tokens for one in completions):
            raise RuntimeError("Error: a completion is short, or its prompt was in the cache")
        return taken


class Llama:
    """llama.cpp's C interface through llama-cpp-python."""

    def __init__(self) -> None:
        import llama_cpp

        self.c = llama_cpp

    def load(self, file: str, threads: int, flash: bool) -> None:
        c = self.c
        self.quiet = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self.quiet, None)
        model = c.llama_model_load_from_file(file.encode(), c.llama_model_default_params())
        wanted = c.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max, wanted.kv_unified = CELLS, STREAMS, True
        wanted.n_batch = wanted.n_ubatch = BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.flash_attn_type = int(flash)
        self.context = c.llama_init_from_model(model, wanted)
        if not self.context:
            raise RuntimeError("Error: llama.cpp made no context")
        self.batch = c.llama_batch_init(BATCH, 0, 1)

    def about(self) -> dict:
        system = self.c.llama_print_system_info().decode().strip()
        return {"version": f"llama-cpp-python {self.c.__version__}", "system": system}

    def prefill(self, count: int) -> float:
        rows = [(token, i, 0, i == count - 1) for i, token in enumerate(prompt(count))]
        self._clear()
        return count / seconds(lambda: self._feed(rows))

    def decode(self, count: int) -> float:
        return self._decoding(1, count)

    def streams(self, count: int) -> float:
        return self._decoding(STREAMS, count)

    def _decoding(self, sequences: int, count: int) -> float:
        self._clear()
        self._feed([(token, i, s, i == PROMPT - 1) for s in range(sequences) for i, token in enumerate(prompt(PROMPT))])
        began = time.perf_counter()
        for i in range(count):
            self._feed([(200 + i, PROMPT + i, s, True) for s in range(sequences)])
        return sequences * count / (time.perf_counter() - began)

    def _feed(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: token, position, sequence, whether its logits are wanted"""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if self.c.llama_decode(self.context, batch):
            raise RuntimeError("Error: llama_decode failed")
        self.c.llama_synchronize(self.context)

    def _clear(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)


class Transformers:
    """The model's forward pass with its cache, greedy."""

    def __init__(self) -> None:
        import torch
        import transformers

        self.torch, self.transformers = torch, transformers

    def load(self, file: str, threads: int, flash: bool) -> None:
        self.torch.set_num_threads(threads)
        # it asks for accelerate before reading any GGUF file, and does not use it for one on the CPU
        self.transformers.modeling_utils.is_accelerate_available = lambda: True
        path = Path(file)
        self.model = self.transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=self.torch.float32
        ).eval()

    def about(self) -> dict:
        size = sum(tensor.nbytes for tensor in self.model.parameters())
        version = f"transformers {self.transformers.__version__}, torch {self.torch.__version__}"
        return {"version": version, "bytes_a_token": size}

    def prefill(self, count: int) -> float:
        ids = self.torch.tensor([prompt(count)])
        return count / seconds(lambda: self._forward(ids, None))

    def decode(self, count: int) -> float:
        token, cache = self._forward(self.torch.tensor([prompt(PROMPT)]), None)
        began = time.perf_counter()
        for _ in range(count):
            token, cache = self._forward(token, cache)
        return count / (time.perf_counter() - began)

    def _forward(self, ids, cache):
        with self.torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


def make(file: str, target: str, kind: str) -> None:
    import ctypes

    import llama_cpp

    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype, wanted.allow_requantize = int(kind), True
    if llama_cpp.llama_model_quantize(file.encode(), target.encode(), ctypes.byref(wanted)):
        raise SystemExit("llama_model_quantize failed")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        serve({"Ours": Ours, "Llama": Llama, "Transformers": Transformers}[sys.argv[2]], sys.argv[3], int(sys.argv[4]),
              sys.argv[5] == "1")  # fmt: skip
    elif sys.argv[1:2] == ["--requantise"]:
        make(*sys.argv[2:5])
    else:
        main()
