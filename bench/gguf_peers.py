"""Our GGUF files in llama.cpp, and our BF16 folders in transformers: the same tokens?

    python bench/gguf_peers.py [--seconds 25] [--text PATH ...] [--llama-python PYTHON] [--out DIR] [--json FILE]

Four small models are trained for some seconds each on text (problems of the tasks here, in Korean and English, or
--text): V3's shape with a query latent, without one, with several groups of experts, and Llama's shape. Each becomes

    a GGUF file   in F32, F16, BF16, Q8_0 and Q4_0, which llama.cpp reads (llama-cpp-python, a process of its own, its
                  cache in float32) and continues greedily from PROMPTS prompts; so do we, from the folder for F32 and
                  from the same file for the others
    a folder      in BF16, which transformers loads with AutoModelForCausalLM and AutoTokenizer, and continues greedily
                  in float32, as do we

and 1,000 strings of Korean, English, numbers and emoji are encoded by all three. Told are: prompts whose 64 tokens are
all equal, the largest difference of the logits after the prompt, how near the two best logits came to one another in
our run (a tie may go either way), and strings with other ids.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from twelve import tasks
from twelve.config import ModelConfig, small_v3
from twelve.convert import load, save
from twelve.convert.gguf_export import DTYPES, export
from twelve.data.corpus import texts as texts_of
from twelve.data.reader import read_documents
from twelve.data.tokenizer import Tokenizer
from twelve.model import Transformer

PROMPTS, LENGTH, CONTEXT, ROWS, VOCABULARY = 8, 64, 128, 8, 2048
STRINGS = 1000
LLAMA = """
import json, sys
import numpy as np, llama_cpp
asked = json.load(sys.stdin)
model = llama_cpp.Llama(asked["file"], n_ctx=512, n_threads=asked["threads"], type_k=0, type_v=0, verbose=False)
def logits():
    row = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(model.n_vocab(),)).copy()
told = {"version": llama_cpp.__version__, "tokens": [], "logits": [], "ids": []}
for prompt in asked["prompts"]:
    model.reset()
    model.eval(prompt)
    told["logits"].append(logits().tolist())
    answer = []
    while len(answer) < asked["length"]:
        answer.append(int(logits().argmax()))
        model.eval(answer[-1:])
    told["tokens"].append(answer)
told["ids"] = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["strings"]]
json.dump(told, sys.stdout)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=25, help="of training, each model")
    parser.add_argument("--text", nargs="+", metavar="PATH", help="to train on instead of problems")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-python", metavar="PYTHON", default=sys.executable,
                        help="the interpreter that has llama-cpp-python")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where models and files stay (default: nowhere)")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = read(options.text) if options.text else made()
    tokenizer = Tokenizer.train(texts, VOCABULARY)
    documents = [[*tokenizer.start_ids, *tokenizer.encode(text, control=False)] for text in texts]
    ids = torch.tensor([index for document in documents for index in document])
    print(f"{len(texts):,} texts, {len(ids):,} tokens, vocabulary {tokenizer.vocab_size:,}")
    prompts = [ids[at : at + 8 + 3 * n].tolist() for n, at in enumerate(range(0, len(ids) - 64, len(ids) // PROMPTS))]
    prompts, lines, rows = prompts[:PROMPTS], strings(texts), []
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(options.out or scratch)
        for name, config in shapes(tokenizer).items():
            model, loss, steps = train(config, ids, options.seconds)
            size = sum(parameter.numel() for parameter in model.parameters())
            print(f"\n{name}: {size:,} parameters, {steps} steps, loss {loss:.2f}")
            save(model, tokenizer, room / name)
            for dtype in DTYPES:
                file = room / f"{name}-{dtype}.gguf"
                export(room / name, file, dtype)
                source = room / name if dtype == "float32" else file
                rows.append({"model": name, "side": f"llama.cpp {dtype}", **compare(
                    *load(source, device="cpu"), llama(options, file, prompts, lines), prompts, lines)})  # fmt: skip
                show(rows[-1])
            save(load(room / name, device="cpu", dtype=torch.bfloat16)[0], tokenizer, room / f"{name}-bf16")
            theirs = transformers(room / f"{name}-bf16", prompts, lines)
            mine = load(room / f"{name}-bf16", device="cpu")
            rows.append({"model": name, "side": "transformers bfloat16 folder", "class": theirs["class"],
                         **compare(*mine, theirs, prompts, lines)})  # fmt: skip
            show(rows[-1])
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, "seconds": options.seconds}, indent=1) + "\n")


def shapes(tokenizer: Tokenizer) -> dict[str, ModelConfig]:
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    plain = small_v3(tokenizer.vocab_size, width=192, layers=4, experts=16, experts_per_token=3, context=512)
    plain = replace(plain, **ends)
    llama = ModelConfig(
        model_type="llama", vocab_size=tokenizer.vocab_size, hidden_size=192, intermediate_size=512,
        num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, **ends,
    )  # fmt: skip
    return {
        "v3-q-lora": replace(plain, q_lora_rank=96),
        "v3": plain,
        "v3-groups": replace(plain, n_group=4, topk_group=2, routed_scaling_factor=1.5, num_nextn_predict_layers=1),
        "llama": llama,
    }


def train(config: ModelConfig, ids: Tensor, seconds: float) -> tuple[Transformer, float, int]:
    """A model trained for so long on windows of the tokens, its last loss and the steps."""
    model = Transformer(config).init_weights(0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator, start, steps, loss = torch.Generator().manual_seed(0), time.monotonic(), 0, 0.0
    while time.monotonic() - start < seconds:
        begins = torch.randint(0, len(ids) - CONTEXT - 1, (ROWS,), generator=generator)
        windows = torch.stack([ids[at : at + CONTEXT + 1] for at in begins.tolist()])
        losses = model.losses(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for layer, load_ in zip(model.moe_layers(), losses.loads, strict=True):
            layer.gate.update_bias(load_, 1e-3)
        loss, steps = losses.main.item(), steps + 1
    return model.eval(), loss, steps


@torch.no_grad()
def compare(
    model: Transformer, tokenizer: Tokenizer, theirs: dict, prompts: list[list[int]], lines: list[str]
) -> dict:  # fmt: skip
    equal, first, nearest, apart = 0, LENGTH, float("inf"), 0.0
    for prompt, answer, row in zip(prompts, theirs["tokens"], theirs["logits"], strict=True):
        cache, ids, mine = model.new_cache(1, len(prompt) + LENGTH), torch.tensor([prompt]), []
        while len(mine) < LENGTH:
            logits = model(ids, cache, last_only=True)[0, -1]
            if not mine:
                apart = max(apart, (logits - torch.tensor(row)).abs().max().item())
            best = logits.topk(2)
            nearest = min(nearest, (best.values[0] - best.values[1]).item())
            mine.append(int(best.indices[0]))
            ids = torch.tensor([mine[-1:]])
        same = next((n for n, (a, b) in enumerate(zip(mine, answer, strict=True)) if a != b), LENGTH)
        equal, first = equal + (same == LENGTH), min(first, same)
    wrong = [line for line, ids in zip(lines, theirs["ids"], strict=True) if tokenizer.encode(line) != ids]
    return {"prompts": len(prompts), "equal": equal, "first_difference": None if equal == len(prompts) else first,
            "logits_apart": apart, "nearest_two": nearest, "strings": len(lines), "other_ids": len(wrong),
            "example": wrong[0] if wrong else None}  # fmt: skip


def show(row: dict) -> None:
    where = "" if row["first_difference"] is None else f", first other token at {row['first_difference']}"
    print(f"  {row['side']:30} {row['equal']} of {row['prompts']} prompts equal for {LENGTH} tokens{where}; logits "
          f"within {row['logits_apart']:.1e}, nearest two {row['nearest_two']:.1e}; {row['other_ids']} of "
          f"{row['strings']} strings with other ids", flush=True)  # fmt: skip
    if row["example"]:
        print(f"    such as {row['example']!r}")


def llama(options: argparse.Namespace, file: Path, prompts: list[list[int]], lines: list[str]) -> dict:
    asked = {"file": str(file), "threads": options.threads, "prompts": prompts, "length": LENGTH, "strings": lines}
    done = subprocess.run([options.llama_python, "-c", LLAMA], input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp does not run {file}: {' '.join(done.stderr.split()[-40:])}")
    return json.loads(done.stdout)


@torch.no_grad()
def transformers(folder: Path, prompts: list[list[int]], lines: list[str]) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder)
    told: dict = {"class": type(words).__name__, "tokens": [], "logits": []}
    for prompt in prompts:
        out, answer = model(torch.tensor([prompt]), use_cache=True), []
        told["logits"].append(out.logits[0, -1].tolist())
        while len(answer) < LENGTH:
            answer.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([answer[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        told["tokens"].append(answer)
    told["ids"] = [words.encode(line, add_special_tokens=False) for line in lines]
    return told


# --- text -------------------------------------------------------------------------------------------------------------


def read(paths: list[str]) -> list[str]:
    found, size = [], 0
    for text in texts_of(read_documents(paths)):
        found.append(text)
        size += len(text)
        if size > 4_000_000:
            break
    return found


def made() -> list[str]:
    names = ("word_problems", "arithmetic", "calendar_clock", "units", "logic", "sorting")
    streams = [tasks.problems(name, "train") for name in names]
    return [f"{problem.question}\n{problem.steps}" for _ in range(1500) for problem in map(next, streams)]


KOREAN = [
    "안녕하세요", "세상", "한국어는", "재미있다", "값은", "배 열두 척이", "ㄱㄴㄷ", "ㅏㅑ",
    "각", "뷁", "책을 읽었다", "그래서요?", "ㅋㅋㅋ",
]  # fmt: skip
ENGLISH = ["Hello world", "it's", "don't", "we'll", "I'VE", "naïve", "café", "snake_case", "CamelCase", "e.g.", "x=y"]
DIGITS = ["0", "7", "42", "2024", "1,234.5", "3.14159", "1e-9", "½", "x²", "Ⅳ", "٣٤", "１２３", "①", "0x1F", "三"]
EMOJI = ["🙂", "👍🏽", "👨‍👩‍👧", "🇰🇷", "☃️", "❤️‍🔥", "🧑🏾‍💻", "✨", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "♾", "😂😂"]
BETWEEN = [" ", " ", "", "  ", "\n", "\n\n", "\t", ", ", "! ", " - ", "...", "/", "\r\n", "\u3000", "\u00a0", "   \n "]


def strings(texts: list[str]) -> list[str]:
    """Of each kind a quarter, mixed with the others here and there, and pieces of the text."""
    draw, out = random.Random(0), []
    for number in range(STRINGS):
        kind = (KOREAN, ENGLISH, DIGITS, EMOJI)[number % 4]
        if number % 5 == 4:
            text = draw.choice(texts)
            start = draw.randrange(max(1, len(text) - 40))
            out.append(text[start : start + draw.randrange(1, 120)])
            continue
        everything = KOREAN + ENGLISH + DIGITS + EMOJI
        words = [draw.choice(everything if draw.random() < 0.2 else kind) for _ in range(draw.randrange(1, 12))]
        out.append("".join(word + draw.choice(BETWEEN) for word in words))
    return out


if __name__ == "__main__":
    main()
