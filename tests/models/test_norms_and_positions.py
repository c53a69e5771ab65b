"""RMS norms and rotary positions, whose gradients are written by hand, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.norms import RMSNorm
from models.rotary import Rotary, rotate

SHAPES = [(3, 5, 16), (2, 7, 3, 8), (4, 1, 24)]
CLOSE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(found: list[Tensor | None], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert torch.allclose(one.double(), other, rtol=CLOSE[dtype], atol=CLOSE[dtype] * other.abs().max().item())


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trains", ["both", "input", "weight"])
def test_an_rms_norm_and_its_gradients_are_those_of_the_equation(shape, dtype, trains):
    norm = RMSNorm(shape[-1], 1e-3, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(drawn(shape[-1:], dtype, 1))
    x, g = 3 * drawn(shape, dtype, 2) + 1, drawn(shape, dtype, 3)
    x.requires_grad_(trains != "weight")
    norm.weight.requires_grad_(trains != "input")
    norm(x).backward(g)
    wide, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    expected.backward(g.double())
    compare([norm(x)], [expected], dtype)
    with torch.no_grad():
        compare([norm(x)], [expected], dtype)
    pairs = [(x.grad, wide.grad)] * x.requires_grad + [(norm.weight.grad, weight.grad)] * norm.weight.requires_grad
    compare([one for one, _ in pairs], [other for _, other in pairs], dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rows", [False, True])
def test_positions_turn_pairs_as_complex_numbers_and_gradients_back(dtype, rows):
    config = ModelConfig(50, n_embd=48, n_head=4, positions="rotary", rope_theta=100.0)
    positions = torch.tensor([[3, 4, 5, 9], [0, 1, 0, 1]]) if rows else torch.arange(4)
    x, g = drawn((2, 4, 4, 12), dtype, 1).requires_grad_(), drawn((2, 4, 4, 12), dtype, 2)
    found = rotate(x, *Rotary(config).at(positions, 10))
    found.backward(g)
    angles = positions[..., None, None] * 100.0 ** (-torch.arange(0, 12, 2).double() / 12)

    def turned(t: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.complex(*t.detach().double().chunk(2, -1)) * torch.polar(torch.ones(()).double(), angles)
        return torch.cat((pairs.real, pairs.imag), -1)

    for one, other in ((found, turned(x, angles)), (x.grad, turned(g, -angles))):  # angles are in fp32
        tolerance = max(CLOSE[dtype], 3e-6)
        assert one.dtype == dtype
        assert torch.allclose(one.double(), other, rtol=tolerance, atol=tolerance)
