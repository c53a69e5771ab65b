"""Rows of one batch that go through adapters of their own get what each gets alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_lora import IDX, randomise, tiny
from torch import Tensor, nn

from lora.attach import Strengths, activate, attach, using
from lora.config import LoRAConfig
from lora.merge import cached_weights
from lora.mixing import mixing
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.errors import UsageError
from runtime.storage.quantized import quantize

CONFIGS = {
    "all": LoRAConfig(rank=4, bias="all"),
    "few": LoRAConfig(rank=2, alpha=3, targets="minimal", train_embeddings=False),
    "rslora": LoRAConfig(rank=3, variant="rslora", bias="lora_only", train_embeddings=False),
    "vera": LoRAConfig(rank=8, variant="vera", train_embeddings=False),
    "adalora": LoRAConfig(rank=4, variant="adalora"),
    "dora": LoRAConfig(rank=4, variant="dora", train_embeddings=False),
}
ROWS: list[Strengths] = [{"all": 1.0}, {}, {"few": 1.0}, {"rslora": 0.5, "vera": 2.0}, {"adalora": 1.0}, {"all": -0.3}]
FULL_TILES: list[Strengths] = [{"all": 1.0}] * 8 + [{"few": 0.7}] * 8  # in the order of the adapters
WITH_DORA: list[Strengths] = [*ROWS, {"dora": 1.0}, {"dora": 0.5, "few": 1.0}]


def with_adapters() -> BigramLanguageModelLoRA:
    """A base with every kind of adapter, none of which is active."""
    model = tiny(bias=True).eval()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        attach(model, config, name)
        randomise(model, seed)
    activate(model)
    return model


def tokens(rows: int) -> Tensor:
    return torch.randint(0, 50, (rows, 12), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def alone(model, idx: Tensor, strengths: Strengths) -> Tensor:
    with using(model, strengths), cached_weights(model):
        return model(idx)[0].float()


@pytest.mark.parametrize("rows", [ROWS, WITH_DORA, FULL_TILES, [{}, {}, {}]], ids=["low", "DoRA", "full", "none"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16 base", "nf4"])
@torch.no_grad()
def test_each_row_gets_what_it_gets_alone(kind: str, rows: list[Strengths]) -> None:
    model, names = with_adapters(), list(dict.fromkeys(name for row in rows for name in row)) or list(CONFIGS)
    for name, p in list(model.named_parameters()):
        if kind == "bf16 base" and ".lora." not in name:
            p.data = p.data.bfloat16()
        if kind == "nf4" and ".lora." not in name and p.dim() == 2 and "_proj" in name:
            layer, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(layer), leaf, nn.Parameter(quantize("nf4", p, name), requires_grad=False))
    idx, limit = tokens(len(rows)), 1e-5 if kind in ("fp32", "nf4") else 2e-2
    with torch.autocast("cpu") if "bf16" in kind else nullcontext():
        expected = [alone(model, idx[i : i + 1], row)[0] for i, row in enumerate(rows)]
        with mixing(model, names) as mix:
            for order in (list(range(len(rows))), list(reversed(range(len(rows))))):
                mix.take([rows[i] for i in order])
                for width in (12, 1):
                    for i, row in zip(order, model(idx[order, :width])[0].float(), strict=True):
                        wanted = expected[i][:width]
                        assert (row - wanted).abs().max() <= limit * wanted.abs().max(), rows[i]


@torch.no_grad()
def test_a_base_without_biases() -> None:
    model = tiny().eval()
    attach(model, CONFIGS["few"], "few")
    randomise(model)
    expected = alone(model, IDX, {"few": 1.0})
    with mixing(model, ["few"]) as mix:
        mix.take([{"few": 1.0}] * 2)
        assert torch.allclose(model(IDX)[0], expected, atol=1e-4)


@torch.no_grad()
def test_a_small_change_arrives_on_a_base_in_bf16() -> None:
    model = with_adapters()
    for name, p in model.named_parameters():
        p.data = p.data * 1e-2 if ".lora.all.B" in name or ".lora.few.B" in name else p.data
    layer = model.blocks[0].attention.q_proj.to(torch.bfloat16)
    x = torch.randn(2, 200, 32, dtype=torch.bfloat16)
    exact = (layer.lora["few"].effective_weight(layer.weight.double()) - layer.weight).float()
    with mixing(model, ["all", "few"]) as mix:
        mix.take([{}, {"few": 1.0}])
        y = layer(x[:1].expand(2, -1, -1)).float()
    change, wanted = y[1] - y[0], x[0].float() @ exact.t()
    assert 0.9 < (change * wanted).sum() / wanted.square().sum() < 1.1


def test_inside_nothing_else_is_activated_and_outside_all_is_as_before() -> None:
    model = with_adapters()
    activate(model, "all")
    before = model(IDX)[0]
    with mixing(model, ["few"]) as mix:
        mix.take([{"few": 1.0}] * 2)
        for change in (lambda: activate(model, "all"), lambda: attach(model, LoRAConfig(), "new")):
            with pytest.raises(UsageError, match="leave that block"):
                change()
        assert not torch.equal(model(IDX)[0], before)
    assert torch.equal(model(IDX)[0], before)
    with pytest.raises(UsageError, match="no adapter 'gone'"), mixing(model, ["gone"]):
        pass
