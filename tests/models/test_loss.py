"""The loss in chunks against the whole one: values and gradients, whatever trains in the head."""

from __future__ import annotations

import pytest
import torch

import models.loss
import models.transformer
from lora.attach import attach
from lora.config import LoRAConfig
from models.config import ModelConfig
from models.transformer import Transformer

IDX = torch.arange(24).reshape(2, 12) * 7 % 50
TARGETS = (torch.arange(24).reshape(2, 12) * 11 % 50).masked_fill(torch.arange(24).reshape(2, 12) % 5 == 0, -100)


def model(kind: str) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        50, 32, 1, 4, max_positions=16, bias=kind == "bias", head_bias=kind == "bias", tied_head=kind == "tied"
    )
    found = Transformer(config).double()
    if kind == "adapter":
        attach(found, LoRAConfig(4, targets="lm_head,q_proj"))
    if kind in ("frozen", "hooked"):
        found.lm_head.requires_grad_(False)
    if kind == "hooked":
        found.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits)
    return found


@pytest.mark.parametrize("kind", ["whole", "bias", "tied", "adapter", "frozen", "hooked"])
@pytest.mark.parametrize("targets", [TARGETS, torch.full_like(TARGETS, -100)], ids=["some", "none"])
def test_it_is_the_whole_loss_with_its_gradients(kind: str, targets: torch.Tensor, monkeypatch) -> None:
    found = {}
    for way, most in (("whole", 2**23), ("chunks", 50 * 7)):
        monkeypatch.setattr(models.loss, "WHOLE", most)
        monkeypatch.setattr(models.loss, "FEWEST", 1)
        monkeypatch.setattr(models.loss, "SHARE", 1000)
        one = model(kind)
        logits, loss = one(IDX, targets)
        assert (logits is None) == (way == "chunks")
        (3 * loss).backward()
        with torch.no_grad():
            assert torch.allclose(one(IDX, targets)[1], loss, rtol=1e-12)
        found[way] = [loss.detach(), *(p.grad for p in one.parameters() if p.requires_grad)]
    assert len(found["whole"]) > 3
    for one, other in zip(*found.values(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-6)
