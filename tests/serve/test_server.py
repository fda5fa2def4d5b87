"""The server as its users see it: the official client, errors in OpenAI's shape, clients that leave."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from scripted import ScriptedEngine, gate_of, serving

from twelve.config import ModelConfig, small_v3
from twelve.data.chat import encode_prompt
from twelve.engine import Engine
from twelve.errors import InputError
from twelve.model import Transformer
from twelve.serve import answer, bind, server, url_of
from twelve.serve.web import is_loopback

THOUGHTS = "열두 척을 센다: 5 + 7 = 12. <thin air>"
ANSWER = "모두 열두 척입니다.\n<b>12</b> ships 🚢"
QUESTION = [{"role": "user", "content": "배는 모두 몇 척인가?"}]


@pytest.fixture(scope="module")
def thinker(tokenizer):
    """A server whose model always says the same, thoughts first."""
    with serving(ScriptedEngine(tokenizer, f"<think>{THOUGHTS}</think>{ANSWER}")) as url:
        yield url


@pytest.fixture(scope="module")
def dreamer(tokenizer):
    """A server with random weights."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        max_position_embeddings=256,
    )  # fmt: skip
    with serving(Engine(Transformer(config).init_weights(seed=1), tokenizer)) as url:
        yield url


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def complete(url, **options):
    return client(url).chat.completions.create(model="tiny", messages=QUESTION, **options)


def streamed(url, **options):
    """The chunks of a stream, and what its deltas add up to: {index: {field: text}}."""
    chunks = list(complete(url, stream=True, **options))
    total = {}
    for chunk in chunks:
        for choice in chunk.choices:
            said = total.setdefault(choice.index, {})
            for field, text in choice.delta.model_dump(exclude_none=True).items():
                said[field] = said.get(field, "") + text
    return chunks, total


def post(url, **more):
    body = {"model": "tiny", "messages": QUESTION} | more
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_in_one_piece(thinker):
    done = complete(thinker, temperature=0)
    choice = done.choices[0]
    assert done.object == "chat.completion" and done.id.startswith("chatcmpl-") and done.model == "tiny"
    assert abs(done.created - time.time()) < 60
    assert choice.message.role == "assistant" and choice.message.content == ANSWER
    assert choice.message.reasoning_content == choice.message.reasoning == THOUGHTS
    assert choice.finish_reason == "stop" and choice.index == 0
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.prompt_tokens > 5 < done.usage.completion_tokens


def test_deltas_add_up_to_the_answer_and_no_tag_leaks(thinker):
    chunks, total = streamed(thinker, temperature=0)
    assert total == {0: {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHTS, "reasoning": THOUGHTS}}
    assert len(chunks) > 20
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}
    assert all("�" not in chunk.model_dump_json() for chunk in chunks)


def test_usage_of_a_stream_comes_when_asked_for(thinker):
    assert all(chunk.usage is None for chunk in streamed(thinker)[0])
    last = streamed(thinker, stream_options={"include_usage": True})[0][-1]
    assert last.choices == [] and last.usage == complete(thinker).usage


def test_a_seed_gives_the_same_text_streamed_or_not(dreamer):
    text = complete(dreamer, seed=7, max_tokens=20).choices[0].message.content
    assert text == complete(dreamer, seed=7, max_tokens=20).choices[0].message.content
    assert text == streamed(dreamer, seed=7, max_tokens=20)[1][0]["content"]
    assert text != complete(dreamer, seed=8, max_tokens=20).choices[0].message.content


def test_without_a_seed_answers_differ(dreamer):
    texts = {complete(dreamer, max_tokens=20).choices[0].message.content for _ in range(3)}
    assert len(texts) == 3


def test_n_samples_differ_and_are_reproducible(dreamer):
    whole = complete(dreamer, seed=7, n=3, max_tokens=12)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == complete(dreamer, seed=7, max_tokens=12).choices[0].message.content
    total = streamed(dreamer, seed=7, n=3, max_tokens=12)[1]
    assert [total[index]["content"] for index in range(3)] == texts
    assert whole.usage.completion_tokens <= 36


def test_temperature_zero_needs_no_seed(dreamer):
    texts = {complete(dreamer, temperature=0, max_tokens=20).choices[0].message.content for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(dreamer, name):
    done = complete(dreamer, seed=1, **{name: 5})
    assert done.usage.completion_tokens == 5 and done.choices[0].finish_reason == "length"


def test_without_max_tokens_the_context_is_the_limit(dreamer):
    usage = complete(dreamer, seed=3).usage
    assert usage.total_tokens <= 256


@pytest.mark.parametrize("stop", ["척입", ["never", "척입"]])
def test_stop_strings(thinker, stop):
    done = complete(thinker, stop=stop)
    assert done.choices[0].message.content == ANSWER[: ANSWER.index("척입")]
    assert done.choices[0].finish_reason == "stop"
    assert streamed(thinker, stop=stop)[1][0]["content"] == done.choices[0].message.content


def test_log_probabilities(dreamer):
    done = complete(dreamer, seed=1, max_tokens=6, logprobs=True)
    content = done.choices[0].logprobs.content
    assert len(content) == 6 and all(token.logprob < 0 for token in content)
    chunks, _ = streamed(dreamer, seed=1, max_tokens=6, logprobs=True)
    found = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert [token for logprobs in found for token in logprobs.content] == content
    assert complete(dreamer, max_tokens=1).choices[0].logprobs is None


@pytest.fixture(scope="module")
def rememberer(tokenizer):
    """As the thinker, with a memory."""
    with serving(ScriptedEngine(tokenizer, f"<think>{THOUGHTS}</think>{ANSWER}", memory=True)) as url:
        yield url


def test_gates_come_with_their_tokens(rememberer, tokenizer):
    script = [*tokenizer.encode(f"<think>{THOUGHTS}</think>{ANSWER}"), min(tokenizer.stop_ids)]
    bytes_of = [list(tokenizer.decode_bytes([token])) for token in script]
    gates = [*map(gate_of, script[:-1]), None]  # the last is drawn and never read
    asked = {"memory_gates": True}
    [choice] = complete(rememberer, extra_body=asked).choices
    assert [row["bytes"] for row in choice.memory_gates] == bytes_of
    assert [row["gate"] for row in choice.memory_gates] == pytest.approx(gates, abs=1e-4)
    assert choice.memory_gates[3]["token"] == tokenizer.decode_bytes([script[3]]).decode(errors="replace")
    chunks, _ = streamed(rememberer, extra_body=asked)
    rows = [row for chunk in chunks for one in chunk.choices for row in getattr(one, "memory_gates", None) or []]
    assert rows == choice.memory_gates


def test_gates_of_several_answers_and_of_one_cut_short(rememberer, tokenizer):
    script = tokenizer.encode(f"<think>{THOUGHTS}</think>{ANSWER}")[:7]
    gates = [*map(gate_of, script[:6]), None]
    for choice in complete(rememberer, n=2, max_tokens=7, logprobs=True, extra_body={"memory_gates": True}).choices:
        assert [row["gate"] for row in choice.memory_gates] == pytest.approx(gates, abs=1e-4)
        assert [row["token"] for row in choice.memory_gates] == [row.token for row in choice.logprobs.content]


def test_gates_of_a_real_memory(tokenizer):
    shape = {"width": 64, "layers": 2, "experts": 0, "context": 256, "hc_mult": 2, "engram_vocab_size": 97}
    model = Transformer(small_v3(tokenizer.vocab_size, **shape)).init_weights(seed=1)
    model.memory.use_tokenizer(tokenizer)
    model.memory.create()
    ids = torch.arange(60)[None]
    for _ in range(3):  # an empty memory has the same gate for all
        model.train().losses(ids, ids + 1).total.backward()
        model.memory.table.update(1.0)
    engine = Engine(model, tokenizer)
    with serving(engine) as url:
        answer = complete(url, max_tokens=12, temperature=0, extra_body={"memory_gates": True})
        [choice] = answer.choices
        drawn = [token for row in choice.memory_gates for token in tokenizer.encode_bytes(bytes(row["bytes"]))]
        assert len(drawn) == len(choice.memory_gates) == answer.usage.completion_tokens
        ids = [*encode_prompt(tokenizer, QUESTION), *drawn]
        with torch.inference_mode():
            model.eval()(torch.tensor([ids]))
        layers = [layer.engram.last_gates.mean(-1) for layer in model.layers if layer.engram is not None]
        expected = torch.stack(layers).mean(0)[0, -len(drawn) : -1].tolist()
        assert [row["gate"] for row in choice.memory_gates[:-1]] == pytest.approx(expected, abs=2e-3)
        assert max(expected) - min(expected) > 0.02


def test_gates_only_where_there_are_some_and_when_asked_for(thinker, rememberer):
    assert not hasattr(complete(rememberer).choices[0], "memory_gates")
    cards = [httpx.get(f"{url}/v1/models").json()["data"][0] for url in (thinker, rememberer)]
    assert [card["memory"] for card in cards] == [False, True]
    with pytest.raises(openai.BadRequestError, match="this model has no memory") as caught:
        complete(thinker, extra_body={"memory_gates": True})
    assert (caught.value.param, caught.value.code) == ("memory_gates", "unsupported_parameter")


def test_history_parts_and_harmless_parameters_are_accepted(thinker):
    messages = [
        {"role": "developer", "content": "짧게 답하라."},
        {"role": "user", "content": [{"type": "text", "text": "하나 더하기 "}, {"type": "text", "text": "하나는?"}]},
        {"role": "assistant", "content": "둘.", "reasoning": "1 + 1", "refusal": None},
        *QUESTION,
    ]
    done = post(
        thinker, messages=messages, user="me", metadata={}, tools=None, presence_penalty=0, logit_bias={}, seed=None,
        response_format={"type": "text"}, top_p=1, temperature=1, stop=None, n=None, tool_choice="auto",
        reasoning_effort="medium", verbosity="medium",
    )  # fmt: skip
    assert done.status_code == 200 and done.json()["choices"][0]["message"]["content"] == ANSWER


def test_models_and_health(thinker):
    models = client(thinker).models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert client(thinker).models.retrieve("tiny").object == "model"
    assert httpx.get(f"{thinker}/health").json() == {"status": "ok", "model": "tiny"}
    with pytest.raises(openai.NotFoundError):
        client(thinker).models.retrieve("large")


def test_a_model_without_a_template_continues_the_last_message(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with serving(ScriptedEngine(tokenizer, " at dawn")) as url:
        assert complete(url).choices[0].message.content == " at dawn"
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["chat"] is False


# --- bad requests -----------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000


@pytest.mark.parametrize("body", [b"", b"{", b"nothing", b"\xff\xfe{}", b'{"a": 1,}', b"[]", b"3", DEEP.encode()])
def test_a_body_that_is_no_json_object(thinker, body):
    answer = httpx.post(f"{thinker}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and "JSON" in error["message"] and error["param"] is None


WRONG = [
    ("messages", None), ("messages", []), ("messages", "hello"), ("messages", {"role": "user"}),
    ("messages[0]", ["hello"]), ("messages[0].role", [{"content": "hi"}]), ("messages[0].role", [{"role": ["user"]}]),
    ("messages[0].role", [{"role": "pirate", "content": "arr"}]), ("messages[0].content", [{"role": "user"}]),
    ("messages[0].content", [{"role": "user", "content": 3}]),
    ("messages[0].content[0]", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("model", 3), ("stream", "yes"), ("stream_options", 1), ("n", 0), ("n", 129), ("n", 1.5), ("n", True),
    ("max_tokens", 0), ("max_tokens", "10"), ("max_tokens", 2.5), ("max_completion_tokens", -1),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True), ("top_p", 1.1),
    ("top_p", [1]), ("seed", "x"), ("seed", 1.5), ("seed", 2**63), ("stop", 3), ("stop", [""]), ("stop", ""),
    ("stop", ["a", 1]), ("stop", ["x"] * 17), ("logprobs", 3), ("memory_gates", 1), ("memory_gates", "yes"),
    ("tools", [{"type": "function"}]), ("top_k", 5),
    ("frequency_penalty", 0.5), ("response_format", {"type": "json_object"}), ("no_such_thing", "x"),
    ("reasoning_effort", "high"), ("verbosity", "low"), ("tool_choice", "required"),
]  # fmt: skip


@pytest.mark.parametrize(("param", "value"), WRONG)
def test_wrong_parameters_are_named(thinker, param, value):
    answer = httpx.post(
        f"{thinker}/v1/chat/completions", content=json.dumps({"messages": QUESTION} | {param.split("[")[0]: value})
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and param in error["message"] and error["type"] == "invalid_request_error"


def test_not_a_number_is_not_a_temperature(thinker):
    body = '{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}'
    answer = httpx.post(f"{thinker}/v1/chat/completions", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"


def test_half_a_character_does_no_harm(thinker):
    half = '{"messages": [{"role": "user", "content": "\\ud800"}], "stop": "\\udfff"%s}'
    for more, status in (("", 200), (', "\\ud800": 1', 400), (', "model": "\\ud800"', 404)):
        answer = httpx.post(f"{thinker}/v1/chat/completions", content=half % more)
        assert answer.status_code == status, answer.text


def test_the_client_raises_what_it_would_raise_with_openai(thinker):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(thinker, temperature=5)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as caught:
        client(thinker).chat.completions.create(model="gpt-4", messages=QUESTION)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(dreamer, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        messages = [{"role": "user", "content": "Q" * 1000}]
        client(dreamer).chat.completions.create(model="tiny", messages=messages, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert "tokens" in caught.value.message and "context of 256" in caught.value.message


def test_a_book_is_refused_before_it_is_encoded(dreamer, monkeypatch):
    def encode(*given, **more):
        raise AssertionError("a megabyte was encoded")

    monkeypatch.setattr("twelve.data.tokenizer.Tokenizer.encode", encode)
    answer = post(dreamer, messages=[{"role": "user", "content": "hello world " * 90_000}])
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_messages_that_are_nested_too_deeply(thinker, monkeypatch):
    def fail(*given):
        raise RecursionError

    monkeypatch.setattr(server, "read_prompt", fail)
    answer = post(thinker)
    assert answer.status_code == 400 and "nested too deeply" in answer.json()["error"]["message"]


def test_a_body_that_does_not_come_gives_its_place_back(thinker, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    host, port = thinker.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as half:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert half.recv(1000).startswith(b"HTTP/1.1 408")
    assert post(thinker).status_code == 200


def test_a_small_memory_shortens_answers(tokenizer):
    model = Transformer(small_v3(tokenizer.vocab_size, 64, 1, 0, context=256)).init_weights(0)
    engine = Engine(model, tokenizer)
    with serving(Engine(model, tokenizer, kv_memory=engine._page_bytes)) as url:
        answer = post(url, max_tokens=2048)
    assert answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "length"


def test_unknown_routes_and_wrong_methods(thinker):
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("POST", "/v1/completions", 404), ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405), ("GET", "/../etc/passwd", 404), ("GET", "/index.html", 404),
    ):  # fmt: skip
        answer = httpx.request(method, thinker + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_beyond_the_limit(thinker, monkeypatch):
    monkeypatch.setattr(server, "MAX_BODY_BYTES", 5000)

    def pieces():  # no Content-Length: the size shows only while reading
        for _ in range(100):
            yield b" " * 1000

    for content in (b" " * 6000, pieces()):
        answer = httpx.post(f"{thinker}/v1/chat/completions", content=content)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    assert post(thinker).status_code == 200


def test_failures_tell_the_client_nothing_and_the_log_no_content(tokenizer, caplog):
    secret = "".join(["SEC", "RET"])  # the log shows lines of code

    def broken_step(step):
        raise RuntimeError(f"quoting {secret}")

    engine = ScriptedEngine(tokenizer, "hi")
    engine.model.step = broken_step
    with caplog.at_level(logging.INFO), serving(engine) as url:
        answer = post(url, messages=[{"role": "user", "content": secret}])
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "Traceback" not in answer.text and secret not in answer.text
        with pytest.raises(openai.APIError, match="failed"):
            streamed(url)
    assert "RuntimeError" in caplog.text and "broken_step" in caplog.text
    assert secret not in caplog.text


def test_no_content_in_the_log_of_good_requests(thinker, caplog):
    with caplog.at_level(logging.DEBUG, logger="twelve"):
        complete(thinker)
    assert "tokens" in caplog.text and "열두" not in caplog.text and "몇 척" not in caplog.text


# --- foreign pages ----------------------------------------------------------------------------------------------------


def test_foreign_pages_are_kept_out(thinker):
    for headers in (
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"},
        {"Host": "evil.example", "Origin": "http://evil.example"}, {"Origin": "http://127.0.0.1:1"}, {"Host": "[oops"},
        {"Origin": "http://["},
    ):  # fmt: skip
        answer = httpx.get(f"{thinker}/v1/models", headers=headers)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "foreign_origin"
        assert "access-control-allow-origin" not in answer.headers
    for headers in ({"Origin": thinker}, {"Host": "localhost:8000"}, {"Host": "[::1]"}, {"Host": "0.0.0.0:80"}):
        assert httpx.get(f"{thinker}/v1/models", headers=headers).status_code == 200


def test_a_name_that_is_not_known_is_told(thinker):
    said = httpx.get(f"{thinker}/v1/models", headers={"Host": "vm:8765"}).json()["error"]["message"]
    assert "does not know the name 'vm'" in said and "localhost" in said


@pytest.mark.parametrize("host", ["192.168..1", "x" * 64 + ".example"])
def test_a_host_that_can_be_none(host):
    with pytest.raises(InputError, match="cannot listen on"):
        bind(host, 0)


def test_the_address_is_one_that_can_be_opened():
    for host, url in (("127.0.0.1", r"http://127\.0\.0\.1:\d+"), ("::1", r"http://\[::1\]:\d+")):
        try:
            sock = bind(host, 0)
        except InputError:  # a machine without IPv6
            continue
        with sock:
            assert re.fullmatch(url, url_of(sock))


def test_what_is_this_machine():
    assert all(map(is_loopback, ("localhost", "127.0.0.2", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::")))
    assert not any(map(is_loopback, ("", "10.0.0.1", "::ffff:10.0.0.1", "127.0.0.1.example")))


def test_the_page_may_load_nothing_from_elsewhere(thinker):
    answer = httpx.get(thinker)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert policy.count("sha256-") == 2
    html = answer.text
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "onclick", "style="):
        assert word not in html
    assert html.count("\n") < 500


# --- time -------------------------------------------------------------------------------------------------------------


def test_others_are_answered_while_the_model_works(tokenizer):
    with serving(ScriptedEngine(tokenizer, "slow", delay=0.3)) as url, ThreadPoolExecutor() as pool:
        working = [pool.submit(post, url) for _ in range(3)]
        time.sleep(0.2)
        assert httpx.get(f"{url}/health").status_code == 200
        assert not any(future.done() for future in working)
        texts = [future.result().json()["choices"][0]["message"]["content"] for future in working]
    assert texts == ["slow"] * 3


def test_deltas_come_as_they_are_made(tokenizer):
    with serving(ScriptedEngine(tokenizer, "one two three four five", delay=0.05)) as url:
        times = [time.perf_counter() for _ in complete(url, stream=True)]
    assert times[-1] - times[0] > 0.3


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_made_together(tokenizer, stream):
    engine = ScriptedEngine(tokenizer, "one two three", delay=0.002)
    with serving(engine) as url:
        if stream:
            assert [said["content"] for said in streamed(url, n=4)[1].values()] == ["one two three"] * 4
        else:
            done = complete(url, n=4)
            assert [choice.message.content for choice in done.choices] == ["one two three"] * 4
            assert done.usage.prompt_tokens_details.cached_tokens == 0
    assert engine.model.passes < 2 * len(engine.model.script)


def test_the_usage_tells_what_came_from_the_cache(dreamer):
    messages = [{"role": "user", "content": "배는 모두 몇 척인가? " * 4}]
    for _ in range(2):
        usage = client(dreamer).chat.completions.create(model="tiny", messages=messages, max_tokens=2).usage
    assert usage.prompt_tokens > 64 and usage.prompt_tokens_details.cached_tokens >= 64


def test_silence_is_bridged_while_a_long_prompt_is_read(tokenizer, monkeypatch):
    monkeypatch.setattr(answer, "KEEPALIVE_SECONDS", 0.05)
    with serving(ScriptedEngine(tokenizer, "ok", delay=0.03, prefill_chunk=2)) as url:
        text = post(url, stream=True).text
        assert text.count(": still working\n\n") >= 3
        assert streamed(url)[1][0]["content"] == "ok"  # the client passes over them


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_model(tokenizer, stream):
    engine = ScriptedEngine(tokenizer, "word " * 500, delay=0.02)
    with serving(engine) as url:
        body = json.dumps({"messages": QUESTION, "stream": stream}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            sock.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: engine.model.passes > 5)
        wait_until(lambda: not engine.scheduler.running)
        passes = engine.model.passes
        assert passes < 100
        time.sleep(0.2)
        assert engine.model.passes == passes
        engine.model.script = [min(tokenizer.stop_ids)]
        assert post(url).status_code == 200


def test_a_client_that_leaves_while_waiting_never_starts(tokenizer):
    engine = ScriptedEngine(tokenizer, "word " * 20, delay=0.1)
    with serving(engine) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(post, url)
        wait_until(lambda: engine.model.passes > 0)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json={"messages": QUESTION}, timeout=0.1)
        alone = len(tokenizer.encode("word " * 20)) + 1
        assert first.result().json()["usage"]["completion_tokens"] == alone
        wait_until(lambda: not engine.scheduler.running)
        assert engine.model.passes <= alone + 1


def test_a_client_that_leaves_the_line_is_gone_while_others_run(tokenizer):
    engine = ScriptedEngine(tokenizer, "word " * 300, delay=0.02, max_sequences=1)
    with serving(engine) as url, ThreadPoolExecutor() as pool:
        first = pool.submit(post, url)
        wait_until(lambda: engine.scheduler.running)
        second = pool.submit(httpx.post, f"{url}/v1/chat/completions", json={"messages": QUESTION}, timeout=0.5)
        wait_until(lambda: engine.scheduler.waiting)
        with pytest.raises(httpx.ReadTimeout):
            second.result()
        wait_until(lambda: not engine.scheduler.waiting, 1.0)
        assert engine.scheduler.running and not first.done()
        engine.model.script = [min(tokenizer.stop_ids)]
        assert first.result().status_code == 200


def test_more_answers_than_there_is_room_for_are_asked_for_again_later(tokenizer, monkeypatch):
    monkeypatch.setattr(server, "MAX_ANSWERS", 3)
    engine = ScriptedEngine(tokenizer, "word " * 300, delay=0.02)
    with serving(engine) as url, ThreadPoolExecutor() as pool:
        for wrong in ({"n": 0}, {"n": 4}):  # what is refused takes no place
            assert post(url, **wrong).status_code == (400 if wrong["n"] == 0 else 429)
        working = [pool.submit(post, url, n=2), pool.submit(post, url, stream=True)]
        wait_until(lambda: len(engine.scheduler.running) == 3)
        answer = post(url)
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "10"
        error = answer.json()["error"]
        assert error["type"] == "requests" and error["code"] == "rate_limit_exceeded"
        assert error["message"] == "3 of at most 3 answers are under way: try again later"
        with pytest.raises(openai.RateLimitError, match="3 of at most 3"):
            complete(url)
        assert httpx.get(f"{url}/health").status_code == 200
        engine.model.script = [min(tokenizer.stop_ids)]
        assert all(done.result().status_code == 200 for done in working)
        assert all(post(url, n=3, stream=stream).status_code == 200 for stream in (True, False) for _ in range(2))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_makes_room(tokenizer, monkeypatch, stream):
    monkeypatch.setattr(server, "MAX_ANSWERS", 1)
    engine = ScriptedEngine(tokenizer, "word " * 300, delay=0.02)
    with serving(engine) as url:
        path, body = f"{url}/v1/chat/completions", {"messages": QUESTION, "stream": stream}
        if stream:
            with httpx.stream("POST", path, json=body):
                assert post(url).status_code == 429
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(path, json=body, timeout=0.2)
        engine.model.script = [min(tokenizer.stop_ids)]
        wait_until(lambda: post(url).status_code == 200)


# --- the process ------------------------------------------------------------------------------------------------------


def test_a_port_in_use_or_impossible_is_bad_input():
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(InputError, match=rf"cannot listen on 127.0.0.1:{port}.*in use.*--port"):
        bind("127.0.0.1", port)
    taken.close()
    with pytest.raises(InputError, match="cannot listen on no.such.host.invalid"):
        bind("no.such.host.invalid", 0)


def post_in_vain(url):
    try:
        assert post(url).status_code == 500
    except httpx.HTTPError:
        pass  # cut off


SERVE = """
import sys, torch
sys.path[:0] = {paths}
from scripted import ScriptedEngine
from twelve.data.tokenizer import Tokenizer
from twelve.serve import run
run(ScriptedEngine(Tokenizer.train(["a few words"], vocab_size=300), "word " * 5000, delay=0.02), "tiny", port=0)
print("ended", flush=True)
"""


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_the_server(busy):
    here = Path(__file__).parent
    code = SERVE.format(paths=[str(here), str(here.parents[1])])
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        url = line.split("page at ")[1].split("/,")[0]
        assert url.startswith("http://127.0.0.1:")
        if busy:
            threading.Thread(target=post_in_vain, args=(url,), daemon=True).start()
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        time.sleep(0.3)
        os.kill(server.pid, signal.SIGINT)
        out, err = server.communicate(timeout=10)
        assert server.returncode == 0 and out == "ended\n"
        assert "Traceback" not in err
    finally:
        server.kill()
