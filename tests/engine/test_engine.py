"""The engine: what it draws, when it ends, how it is shared and stopped."""

import threading
from contextlib import closing

import pytest
import torch

from twelve.engine import ContextLengthError, Engine, Request, sub_seed
from twelve.engine.runner import PAGE, make_runner
from twelve.errors import InputError

PROMPT = "배 열두 척이 새벽에"


def ask(engine, **options):
    options = {"max_tokens": 24, "stop_ids": frozenset()} | options
    prompt = options.pop("prompt", PROMPT)
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return Request(ids, **options)


def test_greedy_is_the_argmax_of_full_forward_passes(model, tokenizer):
    ids = tokenizer.encode(PROMPT)
    with torch.inference_mode():
        for _ in range(20):
            logits = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size]
            ids.append(int(logits.argmax()))
    for chunk in (1, 3, 512):
        engine = Engine(model, tokenizer, prefill_chunk=chunk)
        done = engine.generate([ask(engine, temperature=0, max_tokens=20)])[0]
        assert done.token_ids == ids[-20:]


def test_a_seed_gives_the_same_again_and_none_gives_another(engine):
    same = engine.generate([ask(engine, seed=3), ask(engine, seed=3), ask(engine, seed=4)])
    assert same[0] == same[1] != same[2]
    fresh = engine.generate([ask(engine), ask(engine)])
    assert fresh[0].token_ids != fresh[1].token_ids
    samples = engine.generate([ask(engine, seed=sub_seed(3, index)) for index in range(3)])
    assert samples[0] == same[0] and len({tuple(done.token_ids) for done in samples}) == 3


def test_a_sequence_goes_on_as_it_would_have(engine):
    whole = engine.generate([ask(engine, seed=9)])[0].token_ids
    head = engine.tokenizer.encode(PROMPT) + whole[:10]
    assert engine.generate([ask(engine, prompt=head, seed=9, max_tokens=14)])[0].token_ids == whole[10:]


def test_deltas_put_together_are_the_completion(engine):
    for seed in range(5):
        request = ask(engine, seed=seed, max_tokens=60)
        deltas = list(engine.stream(request))
        done = engine.generate([request])[0]
        assert "".join(delta.text for delta in deltas) == done.text == engine.tokenizer.decode(done.token_ids)
        assert [token for delta in deltas for token in delta.token_ids] == done.token_ids
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
        assert done.completion_tokens == 60 and done.prompt_tokens == len(request.prompt_ids)


def test_stop_ids_end_the_text_and_are_counted(engine):
    free = engine.generate([ask(engine, seed=1)])[0]
    at = 5
    token = free.token_ids[at]
    at = free.token_ids.index(token)
    done = engine.generate([ask(engine, seed=1, stop_ids=frozenset([token]))])[0]
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: at + 1]
    assert done.text == engine.tokenizer.decode(free.token_ids[:at])


def test_the_tokenizers_stop_ids_are_the_default(model, tokenizer):
    engine = Engine(model, tokenizer)
    free = engine.generate([ask(engine, seed=1, max_tokens=100, prompt=[5])])[0]
    done = engine.generate([ask(engine, seed=1, max_tokens=100, prompt=[5], stop_ids=None)])[0]
    stops = [at for at, token in enumerate(free.token_ids) if token in tokenizer.stop_ids]
    assert done.token_ids == (free.token_ids[: stops[0] + 1] if stops else free.token_ids)


def test_stop_strings_end_the_text_before_them(engine):
    free = engine.generate([ask(engine, seed=2, max_tokens=60)])[0].text
    for stop in (free[10:13], free[20:21], free[4:12]):
        request = ask(engine, seed=2, max_tokens=60, stop=[stop])
        done = engine.generate([request])[0]
        assert done.text == free[: free.index(stop)] and done.finish_reason == "stop"
        assert "".join(delta.text for delta in engine.stream(request)) == done.text


def test_log_probabilities_are_those_of_the_model(engine):
    request = ask(engine, seed=1, temperature=0.5, top_p=0.9, logprobs=True)
    done = engine.generate([request])[0]
    ids = torch.tensor([[*request.prompt_ids, *done.token_ids]])
    with torch.inference_mode():
        logits = engine.model(ids)[0, len(request.prompt_ids) - 1 : -1, : engine.tokenizer.vocab_size]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    assert done.logprobs == pytest.approx(expected.tolist(), abs=1e-9)
    assert engine.generate([ask(engine, seed=1)])[0].logprobs == []


def test_without_a_length_an_answer_ends_where_the_pages_do(engine):
    small = Engine(engine.model, engine.tokenizer, kv_memory=engine._page_bytes)
    assert small.context > PAGE
    done = small.generate([ask(small, max_tokens=None, stop_ids=frozenset())])[0]
    assert done.prompt_tokens + done.completion_tokens == PAGE and done.finish_reason == "length"
    with pytest.raises(InputError, match="give it more, or ask for fewer tokens"):
        small.generate([ask(small, max_tokens=PAGE)])


def test_a_context_larger_than_the_memory_leaves_fewer_pages(engine, monkeypatch):
    monkeypatch.setattr("twelve.engine.engine.free_memory", lambda model: 2 * engine._page_bytes)
    small = Engine(engine.model, engine.tokenizer)
    assert small.context > PAGE and small.pool.count == 1
    one, other = (each.generate([ask(each, max_tokens=4, seed=1)])[0].token_ids for each in (small, engine))
    assert one == other


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), MemoryError()])
def test_memory_that_is_not_there_is_one_line(engine, monkeypatch, error):
    runner = make_runner(engine.model, engine.tokenizer.vocab_size)

    def allocate(pages):
        raise error

    monkeypatch.setattr(runner, "allocate", allocate)
    with pytest.raises(InputError, match="no memory for .* GiB of keys and values: --kv-memory sets less"):
        Engine(engine.model, engine.tokenizer, runner=runner)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_that_are_none_are_refused(engine, token):
    for run in (lambda: engine.generate([ask(engine, prompt=[5, token])]), lambda: engine.score([[5, token]])):
        with pytest.raises(InputError, match=f"there is no token {token}: the model knows"):
            run()


def test_the_answer_fills_the_context_and_no_more(engine):
    context = engine.model.config.max_position_embeddings
    for max_tokens in (None, 10**9):
        done = engine.generate([ask(engine, prompt=[7] * (context - 3), max_tokens=max_tokens)])[0]
        assert done.completion_tokens == 3 and done.finish_reason == "length"


def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(engine):
    with pytest.raises(ContextLengthError, match="200 tokens.*context of 128"):
        engine.stream(ask(engine, prompt=[7] * 200))
    with pytest.raises(InputError, match="empty"):
        engine.generate([ask(engine), ask(engine, prompt=[])])


def test_damaged_weights_are_told(model, tokenizer):
    engine = Engine(model, tokenizer)
    kept = model.norm.weight.data.clone()
    try:
        model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(InputError, match="weights are damaged"):
            engine.generate([ask(engine)])
    finally:
        model.norm.weight.data.copy_(kept)
    assert engine.generate([ask(engine)])  # the failure gave the turn back


def test_closing_stops_and_passes_the_turn_on(engine):
    deltas = engine.stream(ask(engine, max_tokens=100))
    for _ in range(4):
        next(deltas)
    assert not torch.is_inference_mode_enabled()
    deltas.close()
    with closing(engine.stream(ask(engine))) as others:
        assert next(others)


def test_a_long_prompt_can_be_left_between_its_chunks(model, tokenizer):
    engine = Engine(model, tokenizer, prefill_chunk=10)
    deltas = engine.stream(ask(engine, prompt=[7] * 100))
    kinds = [next(deltas).token_ids for _ in range(12)]
    assert kinds[:11] == [[]] * 11 and kinds[11] != []


def test_threads_share_the_engine_and_get_what_they_would_alone(engine):
    requests = [ask(engine, seed=seed) for seed in range(4)]
    alone = engine.generate(requests)
    together = [None] * 4

    def work(index):
        together[index] = engine.generate([requests[index]])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone

