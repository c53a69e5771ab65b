"""Attention by blocks against torch's fused kernel, and its gradients against numerical ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import attention
from models.attention import causal_attention


def qkv(T: int, dtype: torch.dtype, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, T, width, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("T", [1, 2, 33, 127, 128, 129, 300, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_by_blocks_is_the_fused_kernel(T: int, dtype: torch.dtype) -> None:
    mine = qkv(T, dtype)
    outputs = causal_attention(*mine, 0.0), F.scaled_dot_product_attention(*mine, is_causal=True)
    assert "AttentionByBlocks" in str(outputs[0].grad_fn.next_functions)
    assert torch.allclose(*outputs, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), mine) for y in outputs), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_its_gradients_are_right_with_and_without_dropout(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 3)

    def attend(*mine: Tensor) -> Tensor:
        torch.manual_seed(5)
        return causal_attention(*mine, dropout)

    torch.autograd.gradcheck(attend, qkv(8, torch.float64, width=2))


def test_queries_of_the_last_positions_get_what_they_get_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 3)
    q, k, v = qkv(8, torch.float64, width=2)
    assert torch.allclose(causal_attention(q[:, :, 3:], k, v, 0.0), causal_attention(q, k, v, 0.0)[:, :, 3:])
    torch.autograd.gradcheck(lambda *mine: causal_attention(mine[0][:, :, 3:], *mine[1:], 0.0), (q, k, v))


def test_the_fused_kernel_serves_where_weights_would_cost_memory() -> None:
    kinds = [causal_attention(*qkv(T, torch.float32), 0.0).grad_fn.name() for T in (1024, 1025)]
    assert ["ScaledDotProduct" in kind for kind in kinds] == [False, True]


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    q, k = torch.zeros(2, 1, 8, 192, 4)
    v = torch.ones(1, 8, 192, 4)
    torch.manual_seed(0)
    y = causal_attention(q, k, v, 0.5)
    assert abs(y.mean() - 1) < 0.05
    assert y.std() > 0.1
    assert set(y[0, :, 0].unique().tolist()) == {0.0, 2.0}  # the first position sees itself only


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    q, k, v = qkv(4, torch.float32)
    (slope,) = torch.autograd.grad(causal_attention(q, k, v, 0.0).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize(
    ("device", "length", "made_anew"), [("cuda", 100, False), ("cuda", 128, True), ("cpu", 100, True)]
)
def test_a_kernel_that_is_made_anew_for_each_length_serves_usual_lengths_only(device, length, made_anew) -> None:
    with attention.kernels(device, length):
        assert torch.backends.cuda.cudnn_sdp_enabled() is made_anew
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("T", [100, 128])
def test_a_gpu_attends_as_the_cpu_does(T: int, segments: bool) -> None:
    there = (torch.arange(T) >= 60).long().expand(2, -1) if segments else None
    mine, its = (
        qkv(T, torch.float32, 16),
        [t.detach().cuda().bfloat16().requires_grad_() for t in qkv(T, torch.float32, 16)],
    )
    found = causal_attention(*its, 0.0, None if there is None else there.cuda())
    expected = causal_attention(*mine, 0.0, there)
    assert (found.cpu() - expected).norm() < 0.02 * expected.norm()
    grads = (torch.autograd.grad(y.float().square().sum(), ts) for y, ts in ((found, its), (expected, mine)))
    for one, other in zip(*grads, strict=True):
        assert (one.cpu() - other).norm() < 0.03 * other.norm()
