"""How much of a small change arrives on weights that are stored in bf16, in training, evaluation and generation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora.attach import activate, attach
from lora.config import LoRAConfig
from lora.layers.linear import LoRALinear, fused_projection
from lora.merge import cached_weights
from lora.variants.registry import VARIANTS
from runtime.device import pick_machine

WIDTH, TOKENS = 256, 512


class Two(torch.nn.Module):
    """Two linears of one input, with weights that bf16 holds exactly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = (LoRALinear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(fused_projection((self.one, self.other), x), -1)


def changed(variant: str, size: float, dropout: float = 0.0) -> tuple[Two, list[Tensor]]:
    """The linears with an adapter of which each changes its weight by so much of its norm, and the changes."""
    model = Two().to(torch.bfloat16)
    attach(model, LoRAConfig(8, targets="one,other", variant=variant, train_embeddings=False, dropout=dropout))
    changes = []
    for layer in (model.one, model.other):
        (module,) = layer.active_modules()
        W = layer.weight.detach().float()
        with torch.no_grad():
            for p in module.lora_plus_parameters():
                p.normal_()
            for _ in range(3):  # what DoRA makes of it is not linear in it
                change = module.effective_weight(W) - W
                for p in module.lora_plus_parameters():
                    p *= size * W.norm() / change.norm()
        changes.append(module.effective_weight(W).detach() - W)
    return model, changes


def arrives(found: Tensor, base: Tensor, wanted: Tensor) -> float:
    """The output's change as a share of the right one, by projection."""
    return (((found - base) * wanted).sum() / wanted.square().sum()).item()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "dora"])
@pytest.mark.parametrize("way", ["training", "dropout", "evaluation", "generation", "several"])
def test_at_least_95_percent_of_a_change_of_1e_4_arrives(way: str, variant: str) -> None:
    model, changes = changed(variant, 1e-4, 0.05 if way == "dropout" else 0.0)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = torch.cat([x.float() @ change.T for change in changes], -1)
    machine = pick_machine("cpu", "bf16")
    with machine.autocast():
        base = torch.cat(
            [torch.nn.functional.linear(x, layer.weight) for layer in (model.one, model.other)], -1
        ).float()
        if way in ("training", "dropout"):
            found = model.train()(x)
        elif way == "several":
            attach(model, LoRAConfig(2, targets="one", train_embeddings=False), "second")
            activate(model, "default", "second")
            with torch.no_grad():
                found = model.eval()(x)
        else:
            with torch.no_grad(), cached_weights(model) if way == "generation" else torch.no_grad():
                found = model.eval()(x)
    assert found.dtype == torch.bfloat16
    assert 0.95 <= arrives(found.float(), base, wanted) <= 1.05


def test_what_a_rounded_sum_would_lose() -> None:
    model, changes = changed("lora", 1e-4)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted, W = x.float() @ changes[0].T, model.one.weight.detach()
    rounded = torch.nn.functional.linear(x, (W.float() + changes[0]).bfloat16()).float()
    assert arrives(rounded, torch.nn.functional.linear(x, W).float(), wanted) < 0.3
