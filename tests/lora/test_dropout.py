"""Dropout by hashed masks: right probability, independent elements, reproducible from the seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lora.functional import LowRankLinear, lora_linear
from lora.layers.dropout import COLUMNS, Dropout, dropout

DTYPES = [torch.float32, torch.bfloat16]


def normalised(dtype: torch.dtype, p: float, seed: int) -> torch.Tensor:
    """What is kept of (400, 4 COLUMNS) elements, with a mean of 0 and a variance of 1."""
    torch.manual_seed(seed)
    kept = dropout(torch.ones(400, 4 * COLUMNS, dtype=dtype), p) != 0
    return (kept.float() - (1 - p)) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_each_element_is_kept_independently_with_its_probability(p: float, dtype: torch.dtype) -> None:
    kept = normalised(dtype, p, 0)
    flat, n = kept.flatten().double(), kept.numel()
    assert abs(flat.mean()) < 5 / math.sqrt(n)
    assert abs(Dropout(None, p).scale * (1 - p) - 1) < 2e-4
    for lag in (1, 2, 3, 4, 8, 64, COLUMNS, 2 * COLUMNS, 4 * COLUMNS):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / math.sqrt(n), lag
    other = normalised(dtype, p, 1).flatten().double()
    assert abs((flat * other).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_corners_of_a_mask_are_independent(dtype: torch.dtype) -> None:
    """Each number of a row is hashed with each of a column: two rows in two columns must not tell of each other."""
    kept = normalised(dtype, 0.5, 0)
    rows, columns = kept.shape
    together = kept @ kept.t()  # over all columns, of each two rows: of squares the mean is their number
    pairs = together[~torch.eye(rows, dtype=torch.bool)]
    assert abs(pairs.square().mean() / columns - 1) < 5 * 2 / rows


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4), (7, 3, 2), (5, 1000)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_it_keeps_shape_and_dtype_and_depends_on_the_seed_only(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    outputs = [torch.manual_seed(seed) and dropout(x, 0.5) for seed in (3, 3)]
    assert torch.equal(*outputs) and outputs[0].shape == x.shape and outputs[0].dtype == dtype
    assert set(outputs[0].flatten().tolist()) <= {0.0, 2.0}
    (gradient,) = torch.autograd.grad(outputs[0].sum(), x)
    assert torch.equal(gradient, outputs[0])  # of ones, both are the mask times its scale


@pytest.mark.parametrize("p", [0.0, 1e-9])
def test_dropout_that_drops_nothing_draws_no_random_numbers(p: float) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    x = torch.ones(5)
    assert torch.equal(dropout(x, p), x)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_probability_still_scales_what_is_left(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(1_000_000, dtype=dtype), 0.9999999)
    assert y.isfinite().all()
    assert set(y.unique().tolist()) <= {0.0, 65536.0}


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_a_linear_with_dropout_has_the_gradients_of_autograd(dtype: torch.dtype) -> None:
    generator, p = torch.Generator().manual_seed(0), 0.3

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x, W, A, B = some(40, 16), some(24, 16), some(4, 16), some(24, 4)
    torch.manual_seed(5)
    (y,) = lora_linear(x, [LowRankLinear(W, None, A, B, 2.0)], p)
    torch.manual_seed(5)
    expected = F.linear(x, W) + 2.0 * dropout(x, p) @ A.t() @ B.t()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    g = torch.randn(y.shape, generator=generator).to(dtype)
    found = zip(torch.autograd.grad(y, (x, W, A, B), g), torch.autograd.grad(expected, (x, W, A, B), g), strict=True)
    for one, other in [(y, expected), *found]:
        assert (one - other).norm() / other.norm() < tolerance
