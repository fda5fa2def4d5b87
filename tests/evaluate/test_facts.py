"""Invented facts: their words, and recall against an oracle that knows them and a slow twin."""

import json
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from twelve import cli
from twelve.config import small_v3
from twelve.convert import save
from twelve.errors import InputError
from twelve.evaluate import bits_per_byte
from twelve.evaluate.compare import differences
from twelve.evaluate.fact_words import ANSWERS, WORDINGS
from twelve.evaluate.facts import CHOICES, KINDS, as_told, documents, facts, recall, without_memory
from twelve.model import Transformer

KNOWN = facts(3, 80)
SHAPE = {"width": 64, "layers": 2, "experts": 0, "context": 128}


def some(seed, languages=("ko", "en")):
    """Eight facts a language, two of each kind."""
    return [fact for language in languages for fact in facts(seed, 80, [language])[:8]]


def model_for(tokenizer, **changes):
    return Transformer(small_v3(tokenizer.vocab_size, **SHAPE | changes)).init_weights(1).eval()


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_facts_and_another_seed_others():
    assert facts(3, 80) == KNOWN
    assert facts(3, 90, ["ko"])[:80] == KNOWN[:80]  # more of them begin with the same
    assert not {fact.subject for fact in facts(4, 80)} & {fact.subject for fact in KNOWN if fact.kind != "book"}


def test_every_subject_has_one_fact_and_every_answer_is_right_as_often():
    many = facts(0, 4 * 2 * CHOICES)
    assert len({fact.subject for fact in many}) == len(many)
    for language in WORDINGS:
        for kind in KINDS:
            asked = [fact for fact in many if (fact.language, fact.kind) == (language, kind)]
            assert set(Counter(fact.answer for fact in asked).values()) == {2}
            assert set(asked[0].choices) == {fact.answer for fact in asked} and len(asked[0].choices) == CHOICES
            assert {fact.asked for fact in asked} == set(range(len(WORDINGS[language][kind])))
    assert {len(answers.split()) for kinds in ANSWERS.values() for answers in kinds.values()} == {CHOICES}


def test_what_is_asked_was_never_told():
    told = set(documents(KNOWN))
    assert len(told) == 4 * len(KNOWN)
    for fact in KNOWN:
        asked = fact.prompt + fact.completion(fact.answer)
        assert asked == fact.sentence(fact.asked) and asked not in told
        assert fact.completion(fact.answer).startswith(f" {fact.answer}") and fact.answer not in fact.prompt.split()
        assert all(fact.subject.lower() in text.lower() and fact.answer in text for text in fact.told())
        assert fact.subject.lower() in fact.prompt.lower()


def test_a_fact_can_be_asked_as_it_was_told():
    for fact, again in zip(KNOWN, as_told(KNOWN), strict=True):
        assert again.prompt + again.completion(fact.answer) in fact.told()
        assert (again.subject, again.answer, again.choices) == (fact.subject, fact.answer, fact.choices)


def test_documents_repeat_in_a_drawn_order():
    thrice = documents(KNOWN, 3, seed=1)
    assert Counter(thrice) == dict.fromkeys(documents(KNOWN), 3)
    assert thrice == documents(KNOWN, 3, seed=1) != documents(KNOWN, 3, seed=2)


def ends_in_a_consonant(word):
    """By Unicode's decomposition of the last syllable."""
    return unicodedata.normalize("NFD", word)[-1] >= "\u11a8"


def test_particles_fit_the_words_before_them():
    checked = set()
    for fact in (fact for fact in facts(5, 200, ["ko"]) if fact.kind != "event"):
        for number, wording in enumerate(WORDINGS["ko"][fact.kind]):
            for answer in fact.choices:
                text = fact.sentence(number, answer)
                expected = wording
                for name, word in (("x", fact.subject), ("a", answer)):
                    expected = expected.replace(f"{{{name}}}", word)
                    for after_consonant, after_vowel in re.findall(rf"{{{name}:(\w+)/(\w+)}}", wording):
                        after_l = after_consonant == "으로" and unicodedata.normalize("NFD", word)[-1] == "\u11af"
                        form = after_consonant if ends_in_a_consonant(word) and not after_l else after_vowel
                        pair = f"{{{name}:{after_consonant}/{after_vowel}}}"
                        expected = expected.replace(pair, word + form)
                        checked.add(form + " after ㄹ" * after_l)
                assert text == expected
    assert {"은", "는", "이", "가", "을", "를", "이다", "다", "으로", "로", "로 after ㄹ"} <= checked


def test_bad_requests_are_one_line():
    with pytest.raises(InputError, match="no facts in 'fr', only in ko, en"):
        facts(0, 80, ["fr"])
    with pytest.raises(InputError, match="79 facts are too few: ask for at least 80 a language"):
        facts(0, 79)
    with pytest.raises(InputError, match="there are no 9,000 facts in a language"):
        facts(0, 9_000)


# --- asking -----------------------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Continues every beginning of the sentences that it was given, and knows nothing else."""

    def __init__(self, tokenizer, sentences):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.next = {}
        for ids in sentences:
            for end in range(1, len(ids)):
                self.next[tuple(ids[:end])] = ids[end]

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        for row, tokens in enumerate(ids.tolist()):
            for at in range(len(tokens)):
                if (following := self.next.get(tuple(tokens[: at + 1]))) is not None:
                    logits[row, at, following] = 5.0
        return logits


def told_ids(tokenizer, fact, answer):
    parts = (fact.prompt, fact.completion(answer))
    return [*tokenizer.start_ids, *(index for part in parts for index in tokenizer.encode(part, control=False))]


def test_an_oracle_is_told_from_one_that_errs(tokenizer):
    known = some(1)
    right = {fact: fact.answer for fact in known}
    # four English facts are known wrongly; of the Korean ones half the persons, and no book
    for fact in known[8:12]:
        right[fact] = fact.choices[fact.choices.index(fact.answer) - 1]
    forgotten = {known[0], *(fact for fact in known if fact.language == "ko" and fact.kind == "book")}
    oracle = Oracle(tokenizer, [told_ids(tokenizer, fact, right[fact]) for fact in known if fact not in forgotten])
    korean, english = recall(oracle, tokenizer, known)
    assert (korean.language, len(korean.chosen), sum(korean.written)) == ("ko", 8, 5)
    assert korean.kinds["place"] == korean.kinds["event"] == 1.0 and korean.kinds["person"] >= 0.5
    assert english.chosen == english.written == [False] * 4 + [True] * 4
    better = replace(english, chosen=[True] * 8)
    chosen, written = differences("facts en", better, english)
    assert (chosen.measure, chosen.difference, chosen.p_value) == ("facts en, chosen", 0.5, 0.125)  # 4 heads of 4
    assert written.difference == 0 and written.p_value == 1
    assert english.kinds == dict.fromkeys(KINDS, 0.5)
    shown = english.to_dict()
    assert shown["chosen_share"] == shown["written_share"] == 0.5 and shown["chance"] == 0.05
    assert shown["chosen_error"] == pytest.approx((0.25 / 8) ** 0.5)


def test_recall_agrees_with_a_slow_twin(tokenizer):
    model, known = model_for(tokenizer), some(2)
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that a slip shows
        expected = {"ko": 0, "en": 0}
        for fact in known:
            sums = []
            for answer in fact.choices:
                ids = told_ids(tokenizer, fact, answer)
                begin = len(ids) - len(tokenizer.encode(fact.completion(answer), control=False))
                logs = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0], -1)
                sums.append(sum(logs[at - 1, ids[at]].item() for at in range(begin, len(ids))))
            expected[fact.language] += fact.choices[sums.index(max(sums))] == fact.answer
    assert {found.language: sum(found.chosen) for found in recall(model, tokenizer, known)} == expected


def test_a_sentence_that_does_not_fit_is_told(tokenizer):
    with pytest.raises(InputError, match=r"facts need a context of \d+ tokens, and the model has only 8"):
        recall(model_for(tokenizer, context=8), tokenizer, KNOWN)


def remembering(tokenizer):
    """A model whose memory has learnt something, and what it was taught."""
    switches = {"engram_layer_ids": [1], "engram_vocab_size": 97, "engram_head_dim": 8, "engram_kernel_size": 3}
    model = Transformer(small_v3(tokenizer.vocab_size, **SHAPE, **switches)).init_weights(1)
    model.memory.use_tokenizer(tokenizer)
    model.memory.create()
    ids = torch.tensor([told_ids(tokenizer, KNOWN[0], KNOWN[0].answer)])
    model.train().losses(ids, ids.roll(-1)).total.backward()
    with torch.inference_mode():
        empty = model.eval()(ids)
    model.memory.table.update(1.0)
    return model, ids, empty


def test_without_memory_is_a_table_of_zeros(tokenizer):
    model, ids, empty = remembering(tokenizer)
    with torch.inference_mode():
        filled = model(ids)
        with without_memory(model):
            assert torch.equal(model(ids), empty)
        assert torch.equal(model(ids), filled) and not torch.allclose(filled, empty)


def test_only_a_model_with_memory_can_do_without_it(tokenizer):
    with pytest.raises(InputError, match="no Engram memory"), without_memory(model_for(tokenizer)):
        pass


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_eval_asks_facts(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("twelve.evaluate.facts.LEAST", 8)  # all 80 of them take their time
    save(model_for(tokenizer), tokenizer, tmp_path / "model", "")
    assert cli.main(["eval", str(tmp_path / "model"), "--facts", "8", "--seed", "1", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["facts"]
    known = some(1, ["en", "ko"])
    assert [found.pop("wording") for found in found] == ["new", "new", "known", "known"]
    expected = [one for asked in (known, as_told(known)) for one in recall(model_for(tokenizer), tokenizer, asked)]
    assert found == [one.to_dict() for one in expected]
    assert cli.main(["eval", str(tmp_path / "model"), "--facts", "--without-memory", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.strip().endswith("this model has no Engram memory to leave out")


def test_eval_writes_what_teaches_facts(tmp_path, capsys):
    path = tmp_path / "facts.jsonl"
    assert cli.main(["eval", "--facts", "80", "--seed", "3", "--language", "ko", "--facts-text", str(path)]) == 0
    told = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert set(told) == set(documents(KNOWN[:80])) and set(Counter(told).values()) == {10}
    assert cli.main(["eval", "--facts", "5", "--facts-text", str(path)]) == 2
    assert capsys.readouterr().err.strip().endswith("5 facts are too few: ask for at least 80 a language")


def test_eval_can_do_without_memory(tokenizer, tmp_path, capsys):
    model, *_ = remembering(tokenizer)
    save(model, tokenizer, tmp_path / "model", "")
    text = tmp_path / "told.txt"
    text.write_text(KNOWN[0].sentence(KNOWN[0].asked), encoding="utf-8")
    bits = []
    for more in ((), ("--without-memory",)):
        assert cli.main(["eval", str(tmp_path / "model"), "--text", str(text), "--device", "cpu", "--json", *more]) == 0
        bits.append(json.loads(capsys.readouterr().out)["text"][0]["bits"])
    with without_memory(model):
        assert bits[1] == bits_per_byte(model, tokenizer, text).bits
    assert bits[0] == bits_per_byte(model, tokenizer, text).bits != bits[1]
