"""lm-eval's own harness, with our model and with its Hugging Face backend on the same folder."""

import pytest
import torch

from twelve.data.tokenizer import Tokenizer
from twelve.errors import InputError

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (twelve[lm-eval])")
transformers = pytest.importorskip("transformers")

TEXTS = ["The ship went out to sea with twelve men. ", "열두 척의 배가 바다로 나갔다. ", "2 + 3 = 5, and 4 - 1 = 3. "]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and theirs."""
    from lm_eval.models.huggingface import HFLM

    from twelve.evaluate.lm_eval import TwelveLM

    path = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer.train([text * 20 for text in TEXTS], 400)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save(path)
    return TwelveLM(str(path)), HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=4)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def test_likelihoods_agree(both):
    ours, theirs = both
    given = requests("loglikelihood", [
        ("The ship went", " out"), ("The ship went ", "out to sea"), ("", "sea"), ("열두 척의", " 배가"),
        ("2 +", " 3 = 5"), ("<|im_start|>user\n2?<|im_end|>\n", "3"), ("sea " * 100, "men"),
    ])  # fmt: skip
    for (nats, greedy), (expected, same) in zip(ours.loglikelihood(given), theirs.loglikelihood(given), strict=True):
        assert nats == pytest.approx(expected, rel=1e-4, abs=1e-4) and greedy == same


def test_whole_texts_agree(both):
    given = requests("loglikelihood_rolling", [(text * count,) for text, count in zip(TEXTS, (1, 9, 30), strict=True)])
    ours, theirs = (one.loglikelihood_rolling(given) for one in both)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_answers_agree(both):
    settings = {"until": ["x", "\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    given = requests("generate_until", [("The ship", settings), ("열두 척의 배가", settings), ("sea " * 100, settings)])
    ours, theirs = (one.generate_until(given) for one in both)
    assert ours == theirs


def test_an_answer_as_long_as_the_context_is_refused(both):
    with pytest.raises(InputError, match="64 tokens are asked for, and the context is 64"):
        both[0].generate_until(requests("generate_until", [("sea", {"until": ["."], "max_gen_toks": 64})]))


def test_answers_are_drawn_when_asked_to(both):
    settings = {"until": [], "max_gen_toks": 12, "temperature": 1.0}
    given = requests("generate_until", [("The ship", settings)] * 3)
    first, again = (both[0].generate_until(given) for _ in range(2))
    assert first == again and len({*first}) > 1


def test_conversations_are_written_by_the_template(both):
    ours, theirs = both
    talk = [{"role": "user", "content": "2 + 3?"}]
    assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk)
    for said in ("So: ", "\n5", "5"):  # the beginning of an answer, to be gone on with
        begun = [*talk, {"role": "assistant", "content": said}]
        assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.chat_template(True) == theirs.tokenizer.chat_template


def test_an_empty_stop_is_none(both):
    answers = [
        both[0].generate_until(requests("generate_until", [("The ship ", {"max_gen_toks": 6, **stop})]))[0]
        for stop in ({}, {"until": [""]}, {"until": ["", "\n\n\n"]})
    ]
    assert answers[0] and len(set(answers)) == 1


def test_a_task_in_a_file_gets_the_same_scores(both, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "task.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_bytes}]\n"
    )
    rows = [f'{{"prompt": "{a} + {b} =", "choices": ["{a + b}", "{a * b + 1}", "{b}"], "answer": 0}}\n'
            for a in range(6) for b in range(6)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    settings = {"tasks": ["mine"], "task_manager": manager}
    found = [simple_evaluate(lm, **settings)["results"]["mine"] for lm in both]
    for key in ("acc,none", "acc_bytes,none", "acc_stderr,none"):
        assert found[0][key] == pytest.approx(found[1][key])
    from twelve.evaluate.choices import choice_accuracy
    from twelve.evaluate.items import read_items

    [own] = choice_accuracy(both[0].model, both[0].tokenizer, "rows", read_items(tmp_path / "rows.jsonl"))
    row = own.to_dict()
    assert row["accuracy"] == pytest.approx(found[0]["acc,none"])
    assert row["accuracy_by_byte"] == pytest.approx(found[0]["acc_bytes,none"])
    assert row["standard_error"] == pytest.approx(found[0]["acc_stderr,none"])
