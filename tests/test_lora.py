"""Low-rank adapters against autograd on the plain sum, an engine's reading of them, and whole runs of fine-tuning."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import twelve
from twelve.calibrate import quantize, quantize_model
from twelve.config import ModelConfig, small_v3
from twelve.engine import Engine, Request
from twelve.errors import InputError
from twelve.files import sha256
from twelve.lora import adapter_state, adapters, attach, bare, merge, refresh, trainable
from twelve.model import Transformer
from twelve.model.moe import Experts
from twelve.quantize import Form, Packed, dequantize, forms_of
from twelve.train.loop import Interrupted, Supervised
from twelve.train.optimizer import MuonAdamW
from twelve.train.plan import Plan
from twelve.train.sft import sft

GQA = {"vocab_size": 340, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
V3 = small_v3(340, width=64, layers=2, experts=4, experts_per_token=2, context=64).to_dict()
CONFIGS = {
    "llama": {"model_type": "llama", **GQA, "mlp_bias": True},
    "qwen2-tied": {"model_type": "qwen2", **GQA, "attention_bias": True, "tie_word_embeddings": True},
    "v3": V3,
    "v3-mtp-qlora": V3 | {"num_nextn_predict_layers": 1, "q_lora_rank": 24},
}
BASES = [None, Form(8, 32, True), Form(4, 32, False)]


def model_of(case: str, form: Form | None = None, dtype=torch.float32) -> Transformer:
    """Of weights so large that a wrong formula shows; form: of its packed matrices."""
    generator = torch.Generator().manual_seed(1)
    model = Transformer(ModelConfig.from_dict(CONFIGS[case])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    if form is not None:
        quantize_model(model, form, form)
        assert forms_of(model)
    return model.to(dtype)


def disturb(model: Transformer) -> None:
    """Give A and B values as a long training might."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    refresh(model)


def ids_of(model: Transformer, rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model: Transformer) -> torch.Tensor:
    return model(ids_of(model))


class Loss(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model.train()

    def forward(self) -> torch.Tensor:
        ids = ids_of(self.model)
        return self.model.losses(ids, ids.roll(-1, 1)).total


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("case", CONFIGS)
def test_gradients_equal_those_of_the_plain_sum(case, merged):
    model = attach(model_of(case, dtype=torch.float64), rank=3, alpha=5.0, merged=merged)
    disturb(model)
    Loss(model)().backward()

    plain, sums, leaves = model_of(case, dtype=torch.float64), {}, []
    for name, module in adapters(model).items():
        keys = ("gate_up_proj", "down_proj") if isinstance(module, Experts) else ("weight",)
        for key, pair in zip(keys, module.pairs(), strict=True):
            a, b = (parameter.detach().clone().requires_grad_() for parameter in (pair.A, pair.B))
            leaves += [(pair.A, a), (pair.B, b)]
            sums[f"model.{name}.{key}"] = plain.get_parameter(f"{name}.{key}").detach() + 5 / 3 * b @ a
    wanted = ("kv_b_proj.weight", "experts.down_proj", "shared_experts.up_proj.weight") if "v3" in case else ()
    assert len(sums) >= 14 and all(any(name.endswith(end) for name in sums) for end in wanted)
    functional_call(Loss(plain), sums, ()).backward()
    for parameter, leaf in leaves:
        assert leaf.grad.abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad, leaf.grad, atol=1e-12, rtol=1e-9)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("form", BASES)
@pytest.mark.parametrize("case", CONFIGS)
def test_nothing_changes_until_a_step_and_merging_changes_nothing(case, form, merged):
    model = model_of(case, form)
    before = logits_of(model)
    frozen = sum(parameter.numel() for parameter in model_of(case).parameters())
    attach(model, rank=2, merged=merged)
    assert trainable(model) == sum(p.numel() for p in adapter_state(model).values()) < frozen / 5
    if merged:  # otherwise absorbed attention and the packed modules' own sums may round otherwise
        assert torch.equal(logits_of(model), before) and not forms_of(model)
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=0)
    disturb(model)
    trained = logits_of(model)
    assert (trained - before).abs().max() > 0.1
    with bare(model):
        torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=0)
    assert torch.equal(logits_of(model), trained)

    merge(model)
    torch.testing.assert_close(logits_of(model), trained, atol=1e-5, rtol=0)
    assert not adapters(model) and not forms_of(model)
    plain = model_of(case)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert model.state_dict().keys() == plain.state_dict().keys() and trainable(model) == frozen


@pytest.mark.parametrize("form", BASES)
@pytest.mark.parametrize("case", CONFIGS)
def test_an_engine_samples_what_was_trained(case, form, tokenizer):
    """After steps and `refresh`: it reads the sums where they lie, and its log-probabilities are the model's."""
    model = attach(model_of(case, form), rank=4)
    engine = Engine(model, tokenizer, kv_memory=1 << 22, speculation="off")
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    before = logits_of(model)
    optimizer = MuonAdamW(model, muon=False)
    for _ in range(2):
        Loss(model)().backward()
        optimizer.step(0.02)
        optimizer.zero_grad()
        refresh(model)
    engine.forget()
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
    model.eval()
    assert (logits_of(model) - before).abs().max() > 0.1
    prompt = list(range(5, 15))
    for answer in engine.generate([Request(prompt, 20, seed=seed, logprobs=True) for seed in range(3)]):
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            logits = model(ids)[0, len(prompt) - 1 : -1, : tokenizer.vocab_size]
        wanted = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, atol=1e-5, rtol=0, check_dtype=False)


def test_what_is_frozen_stays_packed_and_out_of_the_state():
    model = attach(model_of("v3", Form(4, 32, False)), merged=False)
    for name, module in adapters(model).items():
        assert all(isinstance(pair.frozen, Packed) for pair in module.pairs()) or name.endswith("kv_b_proj")
    pairs = set(adapter_state(model))
    assert {name for name in model.state_dict() if "_proj" in name or ".experts" in name} == pairs
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == pairs


def test_rounded_activations_give_nearly_the_same_gradients():
    """Mixed precision: routed and shared experts; A and B and their gradients stay float32."""
    gradients = []
    for enabled in (False, True):
        model = attach(model_of("v3"), rank=4)
        disturb(model)
        x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _ = model.layers[1].mlp(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        out.float().square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter_state(model.layers[1].mlp).values()])
    for plain, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert torch.cosine_similarity(plain.flatten(), rounded.flatten(), dim=0) > 0.999


def test_bad_requests_are_named_and_leave_the_model_alone():
    model = model_of("llama")
    for wrong, message in (
        ({"rank": 0}, "rank of 0"), ({"targets": ("head",)}, "unknown LoRA target 'head'"),
        ({"targets": ("experts",)}, "nothing to adapt among experts"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            attach(model, **wrong)
        assert not adapters(model) and trainable(model) == sum(p.numel() for p in model.parameters())
    attach(model, targets=("mlp",))
    assert all(".mlp." in name for name in adapters(model))
    with pytest.raises(InputError, match="already"):
        attach(model)


@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "v3"])
def test_transformers_reads_the_merged_model(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = attach(model_of(case, Form(4, 32, False)))
    disturb(model)
    trained = logits_of(model)
    twelve.save(merge(model), None, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_of(model)).logits, trained, atol=1e-4, rtol=0)


# --- fine-tuning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A folder with a model, one with the same model packed, and conversations."""
    folder = tmp_path_factory.mktemp("base")
    twelve.save(model_of("v3"), tokenizer, folder / "model")
    quantize(folder / "model", folder / "packed")
    rows = []
    for n in range(60):
        messages = [{"role": "user", "content": f"{n} + 1 = ?"}, {"role": "assistant", "content": f"{n + 1}"}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chat.jsonl").write_text("".join(rows))
    return folder


SHORT = {"steps": 10, "batch": 4, "context": 48, "lora": 4, "learning_rate": 0.01, "quiet": True}


@pytest.mark.parametrize("kind", ["model", "packed"])
def test_fine_tuning_adapters_makes_a_plain_model_and_resumes_bit_for_bit(base, kind, tmp_path, monkeypatch, capsys):
    result = sft(base / kind, [base / "chat.jsonl"], tmp_path / "whole", **SHORT)
    assert "of adapters are trained" in capsys.readouterr().out
    assert "through adapters of rank 4" in (tmp_path / "whole" / "README.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "training" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"] and result["steps"] == 10
    before, after = twelve.load(base / kind)[0], twelve.load(tmp_path / "whole")[0]
    dequantize(before)
    changed = {n for n, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[n])}
    moved = {name for name in changed if not name.endswith("e_score_correction_bias")}  # by balancing
    assert moved == {name for name in after.state_dict() if "_proj" in name} and not forms_of(after)

    original = Supervised.train_step

    def interrupted(self):
        if self.step == 4 and not stops:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    stops = []
    monkeypatch.setattr(Supervised, "train_step", interrupted)
    with pytest.raises(Interrupted) as stop:
        sft(base / kind, [base / "chat.jsonl"], tmp_path / "parts", **SHORT)
    stops.append(stop)
    saved = tmp_path / "parts" / "training" / "checkpoint.safetensors"
    assert saved.stat().st_size < (base / "model" / "model.safetensors").stat().st_size
    sft(base / kind, [base / "chat.jsonl"], tmp_path / "parts", **SHORT)
    assert sha256(tmp_path / "parts" / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")


def test_a_trainer_keeps_the_sums_up_to_date(tmp_path):
    """After a step and after a restore; and whether sums are held makes no difference to the numbers."""
    plan = Plan(
        stage="sft", options={}, config={}, data={}, context=24, batch_size=2, micro_batch_size=2, learning_rate=0.01,
        seed=0, threads=1, precision="float32", muon=False, revisions=[(0, 3)],
    )  # fmt: skip
    ids = ids_of(model_of("v3"))
    targets, positions = ids.roll(-1, 1), torch.arange(24).expand(2, -1)
    batch = SimpleNamespace(ids=ids, targets=targets, documents=torch.zeros_like(ids), positions=positions)
    weights = []
    for merged, folder in ((True, "held"), (False, "made"), (True, "held")):
        (tmp_path / folder / "training").mkdir(parents=True, exist_ok=True)
        trainer = Supervised(attach(model_of("v3"), merged=merged), lambda step: batch, plan, tmp_path / folder)
        trainer.run(quiet=True)  # the third one restores the first's last step
        module = trainer.model.layers[1]
        weights.append([*module.mlp.experts.sums(), *module.self_attn.kv_b_proj.sums()])
    assert not torch.equal(weights[0][0], model_of("v3").layers[1].mlp.experts.gate_up_proj)
    for mine in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(mine, weights[0], strict=True))


def test_packed_weights_are_refused_without_adapters(base, tmp_path):
    with pytest.raises(InputError, match="is quantised"):
        sft(base / "packed", [base / "chat.jsonl"], tmp_path / "out", steps=1, quiet=True)
    with pytest.raises(InputError, match="neither muon nor compile"):
        sft(base / "packed", [base / "chat.jsonl"], tmp_path / "out", steps=1, lora=4, muon=True, quiet=True)
