"""The fused forward and backward of a LoRA linear.

`linear(x) + scale * dropout(x) @ A.T @ B.T`, written plainly, makes a small model's step slower than training all
of it: autograd keeps the (tokens, out) low-rank product, walks through four nodes a linear, and multiplies thin
matrices in the slow orientation. Here one node saves x and x A^T only, a frozen weight gets no gradient, x gets one
only where something below it trains, and every thin product reads contiguous rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + bias + scale d A^T B^T, for x and d (tokens, in), W (out, in), A (rank, in), B (out, rank).

    d is x after dropout, or None where there is none. x, d, W and bias come in the compute dtype; A and B stay in
    theirs and get their gradients in it.
    """

    @staticmethod
    def forward(ctx, x, d, W, bias, A, B, scale):
        A_c = A.to(W.dtype)
        Bt_c = (B * scale).to(W.dtype).t().contiguous()  # (rank, out): its rows are read, forward and backward
        low = (x if d is None else d) @ A_c.t()
        y = x @ W.t() if bias is None else torch.addmm(bias, x, W.t())
        y.addmm_(low, Bt_c)
        keep_x = d is None or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if keep_x else None, d, low, W, A_c, Bt_c)
        ctx.scale, ctx.dtype = scale, A.dtype
        return y

    @staticmethod
    @once_differentiable  # a second derivative would miss what flows through the scaled copy of B
    def backward(ctx, g):
        x, d, low, W, A_c, Bt_c = ctx.saved_tensors
        need_x, need_d, need_W, need_bias, *_ = ctx.needs_input_grad
        g_low = g @ Bt_c.t()
        dx = g @ W if need_x else None
        if d is None and need_x:
            dx.addmm_(g_low, A_c)
        return (
            dx,
            g_low @ A_c if need_d else None,
            g.t() @ x if need_W else None,
            g.sum(0) if need_bias else None,
            (g_low.t() @ (x if d is None else d)).to(ctx.dtype),
            (low.t() @ g).t().to(ctx.dtype) * ctx.scale,
            None,
        )


def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """A LoRA linear, differentiable in everything but scale; a frozen W costs no gradient.

    x: (..., in). W: (out, in), already in the compute dtype. bias: (out,) or None. A: (rank, in). B: (out, rank).
    Returns (..., out) in W's dtype. `dropout` is the probability on the adapter's input; pass 0 to evaluate.
    """
    rows = x.reshape(-1, x.shape[-1]).to(W.dtype)
    dropped = F.dropout(rows, dropout) if dropout else None
    bias = None if bias is None else bias.to(W.dtype)
    with torch.autocast(x.device.type, enabled=False):  # dtypes are settled: nothing is to be cast behind our back
        y = LoRALinearFunction.apply(rows, dropped, W, bias, A, B, scale)
    return y.view(*x.shape[:-1], len(W))
