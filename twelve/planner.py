"""The verb `plan`: what a training here will be and cost; the same for a given model, and for accelerators by name."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twelve import heap
from twelve.config import ModelConfig, deepseek_v2_lite, deepseek_v3
from twelve.convert import load_config, resolve
from twelve.convert.huggingface import config_from
from twelve.errors import InputError
from twelve.files import read_json
from twelve.plan import cost
from twelve.plan.gpus import (
    ACTIVATIONS,
    RESERVED,
    TOKENS_A_PARAMETER,
    UTILISATION,
    largest,
    memory_a_device,
    read_cluster,
    reason,
    sharded,
)
from twelve.plan.machine import Machine
from twelve.plan.memory import TablePlan, reinforcement, training
from twelve.train.outlook import Outlook, expect

MINUTES = 10.0
WATTS = 65.0  # of a processor at work, where nothing is said: an assumption, not a measurement
PRESETS = {"deepseek_v3": deepseek_v3, "deepseek_v2_lite": deepseek_v2_lite}
ANSWERS, LENGTH = 128, 256  # of a step of `rl` with its defaults: 16 problems with 8 answers, question included
TRAINING_CONTEXT = 4096  # tokens of a row on accelerators, as V3's (section 4.2)


def plan(
    paths: Sequence[str] = (), *, minutes: float | None = None, memory: int | None = None, model: str | None = None,
    gpus: str | None = None, parameters: float | None = None, tokens: float | None = None,
    utilisation: float | None = None, watts: float | None = None, price: float | None = None, currency: str = "",
    rent: float | None = None, context: int | None = None, **given: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `pretrain` would do with these `paths`, minutes (10) and bytes of memory; nothing is written.

    model: what `read_model` reads, to be told of instead. gpus: named hardware, like 8xH100, with `model` or so many
    `parameters`, on `tokens` or for `minutes`, at a `utilisation` of the dense BF16 peak. watts: of the machine, or of
    each device; price: of a kilowatt-hour in `currency`; rent: of a device and hour. given: further arguments of
    `expect`. InputError for a request that cannot be met, and for what says nothing in its kind of plan.
    """
    bill = {"price": price, "currency": currency}
    config = read_model(model) if model is not None else None
    here = {"PATH": paths, "--memory": memory, **_options(given.get("switches") or {}), **_options(given)}
    if gpus is not None:
        _refuse("is for a training here: leave it out with --gpus", here)
        return on_named(gpus, config, parameters, tokens, minutes, utilisation, context, watts, rent, **bill)
    named = {"parameters": parameters, "tokens": tokens, "rent": rent, "utilisation": utilisation}
    _refuse("belongs to named hardware: add --gpus, like --gpus 8xH100", _options(named))
    if config is not None:
        bounds = {"minutes": minutes, "watts": watts, "price": price, "currency": currency}
        _refuse("is for a training here: leave it out with --model", here | _options(bounds))
        return of_model(config, context)
    asked = {"minutes": MINUTES if minutes is None else minutes, "memory": memory, "context": context, **given}
    return of_run(expect(paths, **asked), _command(paths, asked), watts or WATTS, **bill)


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they are typed."""
    return {f"--{name.replace('_', '-')}": value for name, value in values.items() if name != "switches"}


def _refuse(why: str, options: Mapping[str, Any]) -> None:
    """InputError for the first that was given."""
    for name, value in options.items():
        if value or (value == 0 and value is not False):  # 0 is an answer, too
            raise InputError(f"{name} {why}")


def read_model(name: str) -> ModelConfig:
    """The configuration of a preset, a config.json, or any model (see `resolve`), quantised ones too. InputError for
    others."""
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name)
    if path.suffix != ".json":
        try:
            path = resolve(name)
        except InputError as error:
            raise InputError(f"{error}; or a config.json, or a preset: {', '.join(PRESETS)}") from error
        if path.is_file():  # .gguf
            return load_config(path)
        path /= "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object")
    try:
        return config_from({key: value for key, value in values.items() if key != "quantization_config"})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


# --- a run here -------------------------------------------------------------------------------------------------------


def of_run(outlook: Outlook, following: str, watts: float, price: float | None, currency: str) -> dict[str, Any]:
    """What a run is expected to take and to give, in words and, in the nested parts, in numbers."""
    best, machine = outlook.best, outlook.machine
    counts = cost.parameters(best.config, mtp=True)
    phases = reinforcement(best.config, ANSWERS, LENGTH)
    fullest = max(phases, key=lambda phase: sum(phases[phase].values()))
    spent = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in outlook.times.items() if seconds >= 0.5)
    text = f", {best.epochs:.2f} times the text" if best.epochs else ""
    return {
        **outlook.lines(),
        "parameters": counts.total, "active_parameters": counts.active,
        "data": f"{best.tokens:,} tokens{text}, {best.tokens_per_second:,.0f} a second",
        "time": f"{outlook.seconds:,.0f} s: {spent}",
        "peak_memory": _bars(best.memory), "memory_of_rl": f"{_bars(phases[fullest])} ({fullest})",
        "kv_bytes_per_token": cost.kv_bytes(best.config),
        "bits_per_byte": f"{best.bits:.3f} ± {best.error:.3f} expected, if the text is like the scaling runs'",
        "energy": _energy(outlook.seconds, watts, price, currency),
        "machine": _told(machine), "expected": outlook.to_dict(), "phases": phases, "corpus": vars(outlook.corpus),
        "machine_measured": vars(machine), "energy_and_money": _spent(outlook.seconds, watts, price),
        "next": following,
    }  # fmt: skip


def _command(paths: Sequence[str], asked: dict[str, Any]) -> str:
    """What to type for the run that was asked about."""
    options = {name: value for name, value in asked.items() if name != "switches"} | (asked.get("switches") or {})
    if options["memory"]:
        options["memory"] = f"{options['memory'] / 2**20:.0f}MiB"
    given = (
        f"--{name.replace('_', '-')}{_value(value)}"
        for name, value in options.items()
        if value is not None and value is not False
    )
    return " ".join(["twelve pretrain", *(shlex.quote(str(path)) for path in paths or ["PATH"]), *given])


def _value(value: Any) -> str:
    if value is True:
        return ""
    return f" {value:g}" if isinstance(value, float) else f" {shlex.quote(str(value))}"


def _told(machine: Machine) -> str:
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in machine.gflops.items())
    return (
        f"threads {machine.threads}, cores {machine.cores}; GFLOP/s: {speeds}; memory {machine.memory_gb_s:g} GB/s, "
        f"{machine.memory_available / 2**30:.1f} of {machine.memory_total / 2**30:.1f} GiB free"
    )


def _bars(parts: Mapping[str, float]) -> str:
    """Bytes by component, the largest first."""
    told = sorted(parts.items(), key=lambda part: -part[1])
    return f"{sum(parts.values()) / 2**30:.2f} GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in told)


def _spent(seconds: float, watts: float, price: float | None) -> dict[str, float | None]:
    hours = seconds / 3.6e6 * watts
    return {"kilowatt_hours": hours, "money": None if price is None else hours * price}


def _energy(seconds: float, watts: float, price: float | None, currency: str) -> str:
    spent = _spent(seconds, watts, price)
    money = "" if price is None else f", {spent['money']:,.4g} {currency}".rstrip() + f" at {price:g} a kWh"
    return f"{spent['kilowatt_hours']:,.4g} kWh at {watts:g} W{money}"


# --- a model that is given --------------------------------------------------------------------------------------------


def of_model(config: ModelConfig, context: int | None = None) -> dict[str, Any]:
    """Sizes of any model that the configuration describes, whether it fits here or not."""
    context = context or min(config.max_position_embeddings, TRAINING_CONTEXT)
    counts, (_, free) = cost.parameters(config), heap.memory()
    parts = training(config, 1, context)
    result: dict[str, Any] = {
        "parameters": counts.total, "active_parameters": counts.active, "embedding_parameters": counts.embedding,
        "head_parameters": counts.head,
    }  # fmt: skip
    if config.num_nextn_predict_layers:
        result["mtp_parameters"] = cost.parameters(config, mtp=True).total - counts.total
    if counts.table:
        table = TablePlan(config, cost.table_rows(config))
        result |= {"table_parameters": counts.table, "table_bytes": table.table_bytes}
    needed = sum(parts.values())
    fits = "fits" if needed <= free else "does not fit"
    return result | {
        "training_flops_per_token": cost.training_flops(config, context), "context": context,
        "kv_bytes_per_token": cost.kv_bytes(config, 2), "weights": f"{2 * counts.total / 1e9:,.2f} GB in bfloat16",
        "training_memory": f"{_bars(parts)}; one row at a time, which {fits} here",
        "memory": parts,
    }  # fmt: skip


# --- accelerators by name ---------------------------------------------------------------------------------------------


def on_named(
    name: str, config: ModelConfig | None, parameters: float | None, tokens: float | None, minutes: float | None,
    utilisation: float | None, context: int | None, watts: float | None, rent: float | None, price: float | None,
    currency: str,
) -> dict[str, Any]:  # fmt: skip
    """Parameters, memory a device under FSDP, and time on so many devices. InputError where they do not hold it."""
    cluster = read_cluster(name)
    if config is not None and parameters is not None:
        raise InputError("--model and --parameters both say how large the model is: leave one out")
    if tokens is not None and minutes is not None:
        raise InputError("--tokens and --minutes both say how long it trains: leave one out")
    share = utilisation or UTILISATION
    seconds = 60 * minutes if minutes is not None else None
    result: dict[str, Any] = {"devices": f"{cluster.count} x {cluster.name}"}
    if config is not None:
        context = context or min(config.max_position_embeddings, TRAINING_CONTEXT)
        counts = cost.parameters(config)
        flops = cost.training_flops(config, context)
        result |= {"parameters": counts.total, "active_parameters": counts.active}
        active, parts = counts.active, memory_a_device(config, cluster, context)
    else:
        if context is not None:
            raise InputError("--context says nothing of so many parameters: name a model with --model")
        active = max(1, int(parameters or largest(cluster, seconds, share)))
        flops = 6.0 * active
        result |= {"parameters": active, "why": "as asked" if parameters else reason(cluster, seconds, share)}
        state = sharded(active, cluster.count)
        parts = {
            "weights, gradients, optimiser": state, "activations (assumed)": ACTIVATIONS * state, "reserved": RESERVED,
        }  # fmt: skip
    speed = cluster.flops(share) / flops
    if tokens is None:
        tokens = speed * seconds if seconds is not None else TOKENS_A_PARAMETER * active
    hours = tokens / speed / 3600
    needed, there = sum(parts.values()), cluster.device.memory * 1e9
    if needed > there:
        raise InputError(
            f"{needed / 1e9:,.1f} GB a device are needed ({_decimal(parts)}), and each {cluster.name} has "
            f"{cluster.device.memory} GB: take more of them, or a smaller model"
        )
    each = watts or cluster.device.watts
    result |= {
        "tokens": int(tokens),
        "time": f"{_duration(hours)} at {share:.0%} of {cluster.device.bf16:g} TFLOPS in 16 bits",
        "tokens_per_second": speed, "device_hours": hours * cluster.count,
        "memory_a_device": f"{needed / 1e9:.1f} of {cluster.device.memory} GB: {_decimal(parts)}",
        "energy": _energy(3600 * hours, each * cluster.count, price, currency),
    }  # fmt: skip
    if rent is not None:
        result["rent"] = f"{hours * cluster.count * rent:,.2f} {currency}".rstrip() + f" at {rent:g} an hour and device"
    return result | {
        "assumed": "FSDP over all devices, AdamW in float32 (16 bytes a parameter), layers recomputed in the backward "
        "pass, one row a device, time without failures and evaluation",
        "memory": parts, "flops_per_token": flops, "hours": hours,
    }  # fmt: skip


def _decimal(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"
