"""A model served on this machine, and asked by the client that programs already use.

    pip install openai
    python examples/ask_a_server.py smollm2 "Which is larger, the sun or the moon?"

It starts `twelve serve MODEL`, asks, prints the answer as it comes, and stops the server. In a program of yours only
the lines in `ask` matter, and any OpenAI client in any language will do.
"""

import argparse
import json
import subprocess
import sys
from contextlib import contextmanager

from openai import OpenAI

QUESTION = "Which is larger, the sun or the moon?"


@contextmanager
def server(model):
    """The address of a server of `model`, on a free port, as long as the block lasts."""
    command = [sys.executable, "-m", "twelve", "serve", model, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()  # one line of JSON, once it listens
        if not line:
            raise SystemExit(process.wait())  # what is wrong stands on standard error
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait()


def ask(url, question, max_tokens, temperature):
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=max_tokens, temperature=temperature,
        seed=1, stream=True,
    )  # fmt: skip
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, or an installed model's name")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.7)
    options = parser.parse_args()
    with server(options.model) as url:
        ask(url, options.question, options.max_tokens, options.temperature)
