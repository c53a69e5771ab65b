"""What a step keeps, by arithmetic, is what is alive after its forward pass; and what a run's memory is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.estimates import built, peak_of_steps, plans_of
from benchmarks.live_bytes import LiveBytes
from jobs.runs.footprint import WORKSPACES, Plan, Shape, footprint
from lora.config import LoRAConfig
from lora.optim import make_optimizer
from models.config import ModelConfig
from models.transformer import Transformer
from runtime.device import Machine
from runtime.storage.quantized import Quantized
from runtime.training.muon import MuonSettings

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA = {"norm": "rms", "positions": "rotary", "mlp": "gated_silu", "n_inner": 160, "n_kv_head": 2}
SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "max_positions": 256}
GPT = ModelConfig(96, **SIZES)
BIASED = ModelConfig(96, **SIZES, bias=True)
SMOL = ModelConfig(96, **SIZES, **LLAMA, tied_head=True)
QWEN = ModelConfig(96, **SIZES, **LLAMA, qk_norm=True, qkv_bias=True)
GPT2 = ModelConfig(200, **SIZES, bias=True, head_bias=False, fused_qkv=True, tied_head=True, mlp="gelu_tanh")
LARGE_VOCABULARY = ModelConfig(9000, 64, 2, 4, max_positions=256)
LONG = ModelConfig(96, 64, 2, 4, max_positions=1100, **LLAMA)
OURS = LoRAConfig(8, 16)
DROPPED = LoRAConfig(16, 32, 0.05, "all-linear", train_embeddings=False)

CASES = {  # name: config, stored dtype, adapter, what else
    "gpt, full": (GPT, FP32, None, {}),
    "gpt, full, fp32": (GPT, FP32, None, {"dtype": FP32}),
    "gpt, LoRA": (GPT, FP32, OURS, {}),
    "gpt, LoRA, fp32": (GPT, FP32, OURS, {"dtype": FP32}),
    "gpt, LoRA, nf4": (GPT, FP32, OURS, {"quantize": "nf4"}),
    "gpt, two targets": (GPT, FP32, LoRAConfig(8, 16, targets="minimal"), {}),
    "gpt with biases, dropout": (BIASED, FP32, None, {"dropout": 0.1}),
    "gpt with biases, dropout everywhere": (BIASED, FP32, LoRAConfig(8, 16, 0.1), {"dropout": 0.1}),
    "llama, full": (SMOL, FP32, None, {}),
    "llama in bf16, LoRA with dropout": (SMOL, BF16, DROPPED, {}),
    "llama in bf16, LoRA": (SMOL, BF16, replace(DROPPED, dropout=0.0), {}),
    "llama in bf16, nf4": (SMOL, BF16, DROPPED, {"quantize": "nf4"}),
    "qwen, full": (QWEN, FP32, None, {}),
    "qwen in bf16, LoRA": (QWEN, BF16, DROPPED, {}),
    "gpt2, full": (GPT2, FP32, None, {}),
    "gpt2, LoRA": (GPT2, FP32, OURS, {}),
    "wider": (ModelConfig(96, 256, 2, 4, max_positions=256), FP32, OURS, {"rows": 8}),
    "logits by chunks, full": (LARGE_VOCABULARY, FP32, None, {}),
    "logits by chunks, LoRA": (LARGE_VOCABULARY, FP32, OURS, {}),
    "beyond attention by blocks": (LONG, BF16, DROPPED, {"rows": 1, "positions": 1100}),
    "beyond attention by blocks, q and v": (LONG, BF16, LoRAConfig(targets="minimal"), {"rows": 1, "positions": 1100}),
}


def plan_of(case: str, **changes) -> Plan:
    config, stored, lora, others = CASES[case]
    others = {"rows": 4, "positions": 200, "dtype": BF16} | others | changes
    machine = Machine(torch.device("cpu"), others.pop("dtype"))
    return Plan(Shape(config, stored), machine, lora, **others)


def tensors_of(model: Transformer) -> list[torch.Tensor]:
    """All that it holds."""
    found = [p.data for p in model.parameters()]
    return [t for p in found for t in (p.parts.values() if isinstance(p, Quantized) else (p,))]


@pytest.mark.parametrize("keeps", ["none", "cheap", "block"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_is_what_is_alive_after_the_forward_pass(case, keeps):
    plan = plan_of(case, keeps=keeps)
    model = built(plan)
    tokens = torch.randint(plan.shape.config.vocab_size, (plan.rows, plan.positions))
    if model.rotary:
        model.rotary.at(tokens, plan.positions)  # a table that is made once
    with LiveBytes([tokens, *tensors_of(model)]) as live:
        with plan.machine.autocast():
            loss = model(tokens, tokens)[1]
        kept = live.by_label().total()
        loss.backward()
    told = footprint(plan)
    assert told.activations.total() == pytest.approx(kept, rel=0.03)
    # While gradients flow the arithmetic of what stands for a moment is coarser.
    assert told.activations.total() + told.running == pytest.approx(live.peak, rel=0.35, abs=told.gradients)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_counted_and_weighed_as_they_are_held(case):
    plan = plan_of(case)
    model, told = built(plan), footprint(plan)
    info = model.get_parameter_info()
    assert (told.parameters, told.trained) == (info["total"], info["trainable"])
    assert told.gradients == 4 * info["trainable"]
    held = sum({t.data_ptr(): t.nbytes for t in tensors_of(model)}.values())
    assert told.weights == pytest.approx(held, rel=0.02)  # of a tiny matrix in nf4 the tables weigh something


@pytest.mark.parametrize("variant", ["rslora", "dora", "vera", "adalora"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_every_kind_of_adapter_is_counted(variant, bias):
    lora = LoRAConfig(4, 8, variant=variant, bias=bias, rank_pattern={} if variant == "vera" else {"q_proj": 2})
    plan = replace(plan_of("gpt with biases, dropout"), lora=lora)
    assert footprint(plan).trained == built(plan).get_parameter_info()["trainable"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
@pytest.mark.parametrize("case", ["gpt, full", "gpt, LoRA", "llama in bf16, nf4"])
def test_what_an_optimizer_keeps_is_what_it_makes(case, optimizer):
    plan = plan_of(case, optimizer=optimizer)
    model = built(plan)
    made = make_optimizer(model, (0.9, 0.99), 0.0, kind=MuonSettings(4.0, BF16) if optimizer == "muon" else optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    made.found_inf = torch.ones(())
    made.step()
    states = [t for state in made.state.values() for name, t in state.items() if name != "step"]
    assert footprint(plan).optimizer == sum(t.nbytes for t in states)


def test_the_peak_has_all_of_it_and_parts_of_a_step_hold_gradients_longer():
    plan = plan_of("gpt, full", rows=16)
    one = footprint(plan)
    assert one.peak > one.weights + one.optimizer + one.activations.total()
    assert footprint(replace(plan, batches=4)).peak > one.peak
    assert footprint(replace(plan, keeps="block")).peak < footprint(replace(plan, keeps="none")).peak
    for device, workspaces in (("mps", 0), ("cuda", WORKSPACES)):
        told = footprint(replace(plan, machine=Machine(torch.device(device), BF16)))
        assert told.peak == told.weights + told.optimizer + told.activations.total() + told.running + workspaces


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["10.7M", "SmolLM2-135M"])
def test_the_peak_is_what_a_gpu_holds(name):
    for plan in plans_of(name, Machine(torch.device("cuda"), BF16)):
        assert footprint(plan).peak == pytest.approx(peak_of_steps(plan), rel=0.15, abs=WORKSPACES), plan
