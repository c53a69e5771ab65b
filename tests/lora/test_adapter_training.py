"""Training an adapter changes every one of its tensors, and none of the base's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_lora import EVERYTHING, IDX, TARGETS, adapted, same, state, stepper, tiny, trained, two_adapters
from torch.utils.checkpoint import checkpoint

from lora.attach import activate, attach, base_tensors
from lora.config import LoRAConfig
from lora.optim import make_optimizer
from lora.variants.registry import VARIANTS
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.errors import UsageError
from runtime.settings.config import Settings
from runtime.storage.tensors import fingerprint


def optimise(model: BigramLanguageModelLoRA, steps: int = 3) -> None:
    optimizer = make_optimizer(model, (0.9, 0.95), 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(steps):
        model(IDX, TARGETS)[1].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_training_changes_every_adapter_tensor_and_never_the_base(bias: str, embeddings: bool) -> None:
    model = tiny(bias=bias != "none")
    digest = fingerprint(base_tensors(model))
    attach(model, LoRAConfig(rank=4, bias=bias, train_embeddings=embeddings))
    before = state(model)
    optimise(model)
    after = state(model)
    assert fingerprint(base_tensors(model)) == digest
    assert {key for key in after if not torch.equal(after[key], before[key])} == set(trained(model))
    embedded = {key for key in trained(model) if "embedding" in key}
    assert len(embedded) == 2 * embeddings
    biases = {key for key in trained(model) if key.endswith(".bias")}
    assert len(biases) == {"none": 0, "lora_only": 2 * 6 + 1, "all": 2 * 6 + 1 + 2 * 2 + 1}[bias]


def test_training_does_not_change_an_inactive_adapter() -> None:
    model = two_adapters()
    activate(model, "two")
    before = state(model)
    optimise(model, 2)
    moved = {key for key, t in state(model).items() if not torch.equal(t, before[key])}
    assert moved == set(trained(model))
    assert all(".lora.two." in key for key in moved)


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_only_matrices_decay_and_lora_plus_raises_the_learning_rate_of_b(ratio: float) -> None:
    model = adapted(EVERYTHING, bias=True)
    attach(model, LoRAConfig(), "resting")
    activate(model, "default")
    groups = make_optimizer(model, (0.9, 0.95), 0.1, ratio).param_groups
    how = {p: (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(how) == len(trained(model))
    for name, p in trained(model).items():
        assert how[p] == (0.1 if p.dim() == 2 else 0.0, ratio if name.endswith(".B") else 1.0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_adapter_matrix_gets_a_gradient_over_a_frozen_base(recompute: bool, autocast: bool) -> None:
    found = []
    for recomputing in (False, recompute):
        model = adapted(LoRAConfig(dropout=0.3, train_embeddings=False), dropout=0.2)
        if recomputing:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        torch.manual_seed(4)
        with torch.autocast("cpu", enabled=autocast):
            loss = model(IDX, TARGETS)[1]
        loss.backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert len(found[0]) == 2 * (2 * 6 + 1)
    assert all(gradient.any() for gradient in found[0].values())
    assert same(*found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_plus_scales_the_learning_rate_of_what_starts_at_zero(variant: str) -> None:
    model = tiny()
    attach(model, LoRAConfig(rank=4, variant=variant))
    optimizer = make_optimizer(model, (0.9, 0.95), 0.1, 4.0)
    fast = {p for group in optimizer.param_groups if group["lr_scale"] == 4 for p in group["params"]}
    assert fast == {p for p in trained(model).values() if not p.any()} != set()
    run = stepper(model, 5, optimizer=optimizer)
    run.step(0)
    assert {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups} == {(4.0, 0.08), (1.0, 0.02)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained(model))


@pytest.mark.parametrize("ratio", [0, -1, 1001, "nan", "fast"])
def test_an_invalid_lora_plus_ratio_is_refused_by_name(ratio: object) -> None:
    with pytest.raises(UsageError, match="^LORA_PLUS_RATIO=.*: must be a number above 0") as error:
        Settings.from_dict({"lora_plus_ratio": ratio, "use_lora": True, "base": "b"})
    assert "\n" not in str(error.value)
