"""The fused forward and backward of a LoRA linear.

`linear(x) + scale * dropout(x) @ A.T @ B.T`, written plainly, makes a small model's step slower than training all
of it: every linear takes two more passes over its output, autograd keeps the (tokens, out) low-rank product, and thin
matrices are multiplied in the slow orientation. A step without dropout therefore builds the effective weight, which
is a few percent of the product it then saves, and runs the same two products as a frozen linear; only the
gradients of A and B cost thin products, which read contiguous rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class EffectiveLinear(torch.autograd.Function):
    """y = x (W + scale B A)^T + bias, for x (tokens, in), W (out, in), A (rank, in), B (out, rank).

    x comes in the compute dtype; the weight is summed in W's own, so that no small change is rounded away twice.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale):
        A_c, Bt_c = A.to(x.dtype), (B * scale).to(x.dtype).t().contiguous()  # (rank, out): the rows backward reads
        W_c = torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=scale).to(x.dtype)
        ctx.save_for_backward(x, W_c, A_c, Bt_c)
        ctx.scale, ctx.dtypes = scale, (A.dtype, W.dtype)
        return F.linear(x, W_c, bias)

    @staticmethod
    @once_differentiable  # a second derivative would miss what flows through the copies
    def backward(ctx, g):
        x, W_c, A_c, Bt_c = ctx.saved_tensors
        need_x, need_W, need_bias, *_ = ctx.needs_input_grad
        g_low, low = Bt_c @ g.t(), A_c @ x.t()  # (rank, tokens)
        return (
            g @ W_c if need_x else None,
            (g.t() @ x).to(ctx.dtypes[1]) if need_W else None,
            g.sum(0) if need_bias else None,
            (g_low @ x).to(ctx.dtypes[0]),
            (low @ g).t().to(ctx.dtypes[0]) * ctx.scale,
            None,
        )


def lora_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
    weight_in: Callable[[torch.dtype], Tensor] | None = None,
) -> Tensor:
    """A LoRA linear, differentiable in everything but scale; a frozen W costs no gradient.

    x: (..., in), in the compute dtype. W: (out, in). bias: (out,) or None. A: (rank, in). B: (out, rank).
    Returns (..., out) in x's dtype. `dropout` is the probability on the adapter's input; pass 0 to evaluate.
    `weight_in` gives W in another dtype, for who keeps a copy.
    """
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # dtypes are settled: nothing is to be cast behind our back
        if torch.is_grad_enabled() and not dropout:
            y = EffectiveLinear.apply(rows, W, bias, A, B, scale)
        else:
            y = beside(rows, weight_in(x.dtype) if weight_in else W.to(x.dtype), bias, A, B, scale, dropout)
    return y.view(*x.shape[:-1], len(W))


def beside(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
    """The paper's own formula, x W^T + bias + scale dropout(x) A^T B^T: what dropout needs, since no weight can stand
    for it, and what a few tokens at a time are fastest with."""
    low = F.linear(F.dropout(x, dropout), A.to(x.dtype))
    return F.linear(x, W, bias) + F.linear(low, (scale * B).to(x.dtype))
