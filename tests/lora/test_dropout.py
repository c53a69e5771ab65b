"""Dropout from 16 random bits per element: right probability, independent elements, reproducible from the seed."""

from __future__ import annotations

import math

import pytest
import torch

from lora.functional import dropout, dropout_mask


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_each_element_is_kept_independently_with_its_probability(p: float) -> None:
    torch.manual_seed(0)
    kept, scale = dropout_mask(torch.empty(400, 1000), p)
    n, kept = kept.numel(), kept.flatten().double()
    assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert abs(scale * (1 - p) - 1) < 2e-4
    for lag in (1, 2, 3, 4, 8, 1000):
        together = ((kept[lag:] - 1 + p) * (kept[:-lag] - 1 + p)).mean() / (p * (1 - p))
        assert abs(together) < 5 / math.sqrt(n), lag


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4), (7, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_keeps_shape_and_dtype_and_depends_on_the_seed_only(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    outputs = [torch.manual_seed(seed) and dropout(x, 0.5) for seed in (3, 3)]
    assert torch.equal(*outputs) and outputs[0].shape == x.shape and outputs[0].dtype == dtype
    assert set(outputs[0].flatten().tolist()) <= {0.0, 2.0}
    (gradient,) = torch.autograd.grad(outputs[0].sum(), x)
    assert torch.equal(gradient, outputs[0])  # of ones, both are the mask times its scale


def test_dropout_of_zero_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    x = torch.ones(5)
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.rand(1), expected)


def test_the_largest_probability_still_scales_what_is_left() -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(1_000_000), 0.9999999)
    assert y.isfinite().all()
    assert set(y.unique().tolist()) <= {0.0, 65536.0}
