"""Forward and backward of LoRA linears.

`linear(x) + scale * dropout(x) @ A.T @ B.T`, written plainly, makes a small model's step slower than training all
of it: every linear takes two more passes over its output, autograd keeps the (tokens, out) low-rank product, and thin
matrices are multiplied in the slow orientation. A step without dropout therefore computes with the effective weight,
which costs a few percent of one product. What is left to choose is how its gradient reaches A and B: see
`thin_products_pay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ENOUGH = 20e6  # multiplications that must be saved: see `thin_products_pay`


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def kept_by_dropout(like: Tensor, p: float) -> tuple[Tensor, float]:
    """Which elements of a tensor dropout keeps, each with probability 1 - p, and what to multiply those by.

    On the CPU torch draws one number after the other, 6 ns each, which would take longer than the rest of a small
    model's step; here 64 random bits serve four elements, so that p is rounded to a multiple of 2^-16.
    """
    if like.device.type != "cpu":
        return torch.rand(like.shape, device=like.device) >= p, 1 / (1 - p)
    dropped, count = min(round(p * 2**16), 2**16 - 1), like.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return bits[:count].view(like.shape) >= dropped - 2**15, 2**16 / (2**16 - dropped)


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout` in training; for p = 0 it is x itself."""
    if not p:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    kept, scale = kept_by_dropout(x, p)
    return x * kept * scale


class LowRank(NamedTuple):
    """A linear with a low-rank update, x (W + scale B A)^T + bias.

    W: (out, in). bias: (out,) or None. A: (rank, in). B: (out, rank).
    """

    W: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


def concatenated(biases: Sequence[Tensor | None]) -> Tensor | None:
    """The biases of linears of one kind, one after the other; None where they have none."""
    return biases[0] if len(biases) == 1 or biases[0] is None else torch.cat(biases)


def stacked(parts: Sequence[LowRank]) -> LowRank:
    """Linears that share their input as one, whose output is theirs one after the other: the As stand under each
    other, the scaled Bs are the blocks of a diagonal."""
    Ws, biases, As, Bs, scales = zip(*parts, strict=True)
    B = torch.block_diag(*(B if scale == 1 else B * scale for B, scale in zip(Bs, scales, strict=True)))
    return LowRank(torch.cat(Ws), concatenated(biases), torch.cat(As), B, 1.0)


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
        low, g_low = x @ A_c.t(), g @ Bt_c.t()  # (tokens, rank): this way round both read rows
        return (
            g @ W_c if need_x else None,
            (g.t() @ x).to(ctx.dtypes[1]) if need_W else None,
            g.sum(0) if need_bias else None,
            (g_low.t() @ x).to(ctx.dtypes[0]),
            (low.t() @ g).t().to(ctx.dtypes[0]) * ctx.scale,
            None,
        )


def thin_products_pay(tokens: int, parts: Sequence[LowRank]) -> bool:
    """Whether gradients of A and B are taken from the tokens, and not from the gradient of the effective weight.

    From the tokens it is 4 thin products, and no product of the size of the weight's gradient; in exchange they read
    the tokens four times, and a dozen small operations more go with them. On 2 cores with AVX512_BF16, forward and
    backward in ms from the tokens / from the weight, for weights (in, out) at rank 8: (128, 128) with 4,096 tokens
    1.41 / 1.35 in bf16 and 2.77 / 2.62 in fp32; (128, 512) with 512 tokens 1.31 / 0.96 and 1.18 / 1.35, with 1,024
    tokens 1.95 / 2.37 and 2.29 / 2.59; (384, 1536) with 2,048 tokens 15.0 / 20.1 and 31.4 / 40.8.
    """
    size, thin = sum(part.W.numel() for part in parts), sum(part.A.shape[0] for part in parts)
    around = parts[0].A.shape[1] + sum(len(part.W) for part in parts)
    return tokens * (size - 8 * thin * around) > ENOUGH


def lora_linear(x: Tensor, *parts: LowRank) -> Tensor:
    """LoRA linears of one input, differentiable in everything but scale; a frozen W costs no gradient.

    x: (..., in), in the compute dtype. Returns (..., sum of out) in x's dtype, the linears' outputs side by side.
    """
    biases = concatenated([part.bias for part in parts])
    bias = None if biases is None else biases.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # dtypes are settled: nothing is to be cast behind our back
        if thin_products_pay(x.numel() // x.shape[-1], parts):
            W, _, A, B, scale = parts[0] if len(parts) == 1 else stacked(parts)
            y = EffectiveLinear.apply(x.reshape(-1, x.shape[-1]), W, bias, A, B, scale)
            return y.view(*x.shape[:-1], len(W))
        weights = [torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=scale) for W, _, A, B, scale in parts]
        return F.linear(x, (weights[0] if len(parts) == 1 else torch.cat(weights)).to(x.dtype), bias)


def lora_linear_as_written(x: Tensor, part: LowRank, p: float = 0.0) -> Tensor:
    """The paper's own formula, x W^T + bias + scale dropout(x) A^T B^T: what dropout needs, since no weight can stand
    for it, and what a few tokens at a time are fastest with. `p` is dropout's probability on the adapter's input."""
    W, bias, A, B, scale = part
    with torch.autocast(x.device.type, enabled=False):
        low = F.linear(dropout(x, p), A.to(x.dtype)).reshape(-1, len(A))
        y = F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return torch.addmm(y.view(-1, len(W)), low, (scale * B).to(x.dtype).t()).view(y.shape)
