"""Forward and backward of LoRA linears.

`linear(x) + scale * dropout(x) @ A.T @ B.T`, written plainly, makes a step of a small model slower than training all of
it: every linear passes over its output twice more, autograd keeps the (tokens, out) low-rank product, and narrow
matrices are multiplied in the slow orientation. There are two fast forms. `EffectiveLinear` computes with the effective
weight, which costs a few percent of one matmul; how its gradient reaches A and B is left to `low_rank_gradients_pay`.
`AddedLinear` adds the two products before either is rounded; it serves where there is no single weight that equals the
formula (dropout), and where that weight, rounded, would lose small changes (`needs_adding`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora.layers.dropout import Dropout, kept, kept_
from runtime.storage.quantized import Quantized
from runtime.training.recompute import recomputable, recomputing

MIN_SAVED = 40e6  # multiplications that low-rank gradients must save: see `low_rank_gradients_pay`


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matmuls run in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32 where it is in less, else x itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def row_norms(V: Tensor) -> Tensor:
    """Return the norm of each row (out,), detached, and above 0 so that it can be divided by."""
    return torch.linalg.vector_norm(V.detach(), dim=1).clamp_min(torch.finfo(V.dtype).tiny)


class LowRankLinear(NamedTuple):
    """The tensors of a linear with a low-rank update: x V^T + bias where V = W + scale B A.

    W: (out, in). bias: (out,) or None. A: (rank, in). B: (out, rank). magnitude: (out,) or None; with one, each row of
    V is scaled to that norm, and no gradient flows through the norm that it had (DoRA).
    """

    W: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    def row_scale(self, V: Tensor) -> Tensor | None:
        """Return the factor (out, 1) of each row of V, or None without a magnitude."""
        if self.magnitude is None:
            return None
        return (self.magnitude / row_norms(V).to(self.magnitude.dtype))[:, None]

    def updated_weight(self) -> Tensor:
        """Return V (out, in), in W's dtype or fp32, whichever is more precise; differentiable."""
        W = at_least_fp32(self.W)
        return torch.addmm(W, self.B.to(W.dtype), self.A.to(W.dtype), alpha=self.scale)

    def effective_weight(self) -> Tensor:
        """Return V with the magnitude applied; differentiable."""
        V = self.updated_weight()
        row_scale = self.row_scale(V)
        return V if row_scale is None else V * row_scale.to(V.dtype)


def cat_or_none(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate the biases, or magnitudes, of linears of one kind; None where they have none."""
    return tensors[0] if len(tensors) == 1 or tensors[0] is None else torch.cat(tensors)


def storage_key(tensor: Tensor) -> tuple:
    """Return a key that is equal for tensors that share their memory, even as different objects."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def fused_update(parts: Sequence[LowRankLinear]) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """Return A, B, scale and magnitude of linears of the same input as of one, whose output is theirs, concatenated.

    The As are stacked and the scaled Bs form a block diagonal; where all share one A, the scaled Bs are stacked.
    """
    if len(parts) == 1:
        return parts[0].A, parts[0].B, parts[0].scale, parts[0].magnitude
    _, _, As, Bs, scales, magnitudes = zip(*parts, strict=True)
    Bs = [B if scale == 1 else B * scale for B, scale in zip(Bs, scales, strict=True)]
    A, B = (As[0], torch.cat(Bs)) if len(set(map(storage_key, As))) == 1 else (torch.cat(As), torch.block_diag(*Bs))
    return A, B, 1.0, cat_or_none(magnitudes)


def forgotten(W: Tensor) -> bool:
    """Return whether a frozen weight in the compute dtype is made anew for the backward pass, and not kept for it."""
    return recomputing() or isinstance(W, Quantized)


class FrozenLinear(torch.autograd.Function):
    """x W^T + bias, for x (tokens, in) in the compute dtype and a frozen W (out, in) in any, in one part or several."""

    @staticmethod
    def forward(ctx, x, bias, *Ws):
        ctx.save_for_backward(*Ws)
        return F.linear(x, FrozenLinear.whole(Ws, x.dtype), bias)

    @staticmethod
    def whole(Ws, dtype):
        """The parts in a dtype, under each other."""
        return cat_or_none([W.to(dtype) for W in Ws])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        Ws, (need_x, need_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        dx = g @ FrozenLinear.whole(Ws, g.dtype) if need_x else None
        return dx, g.sum(0) if need_bias else None, *[None] * len(Ws)


def frozen_linear(x: Tensor, Ws: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Apply frozen linears to one input (..., in), in the compute dtype, keeping no copy of their weights: their
    outputs, concatenated."""
    with torch.autocast(x.device.type, enabled=False):
        y = FrozenLinear.apply(x.reshape(-1, x.shape[-1]), bias, *Ws)
    return y.view(*x.shape[:-1], y.shape[-1])


class EffectiveLinear(torch.autograd.Function):
    """Compute a `LowRankLinear` of x (tokens, in); called with x and the tuple's fields but W, which comes last, cut
    into any number of parts.

    x comes in the compute dtype. W + scale B A is summed in W's dtype, so that a small update is not rounded twice.
    """

    @staticmethod
    def forward(ctx, x, bias, A, B, scale, magnitude, *Ws):
        W_c, row_scale = EffectiveLinear.rounded(x.dtype, A, B, scale, magnitude, Ws)
        y = F.linear(x, W_c, bias)
        kept = (None, None) if any(map(forgotten, Ws)) else (W_c, row_scale)
        ctx.save_for_backward(x, A, B, magnitude, *kept, *((None, None) if magnitude is None else (y, bias)), *Ws)
        ctx.scale = scale
        return y

    @staticmethod
    def rounded(dtype, A, B, scale, magnitude, Ws):
        """The effective weight in a dtype, and the factor of each row, or None without a magnitude."""
        part = LowRankLinear(Ws[0] if len(Ws) == 1 else torch.cat(Ws), None, A, B, scale, magnitude)
        V = part.updated_weight()
        row_scale = part.row_scale(V)
        return (V if row_scale is None else V * row_scale.to(V.dtype)).to(dtype), row_scale

    @staticmethod
    @once_differentiable  # a second derivative would miss what flows through the copies
    def backward(ctx, g):
        x, A, B, magnitude, W_c, row_scale, y, bias, *Ws = ctx.saved_tensors
        need_x, need_bias, need_A, *_ = ctx.needs_input_grad
        if W_c is None:
            W_c, row_scale = EffectiveLinear.rounded(x.dtype, A, B, ctx.scale, magnitude, Ws)
        scaled_B = B if row_scale is None else B * row_scale
        A_c, Bt_c = A.to(x.dtype), (scaled_B * ctx.scale).to(x.dtype).t().contiguous()  # (rank, out): its rows are read
        low = x @ A_c.t()  # (tokens, rank): this way round it reads rows
        dB, dm, dWs = (low.t() @ g).t().to(A.dtype) * ctx.scale, None, [None] * len(Ws)
        if any(ctx.needs_input_grad[6:]):
            dW = g.t() @ x
            dW = dW if row_scale is None else dW * row_scale.to(dW.dtype)
            dWs = [part.to(W.dtype) for part, W in zip(dW.split([len(W) for W in Ws]), Ws, strict=True)]
        if magnitude is not None:
            dB = dB * row_scale
            dm = (g * (y if bias is None else y - bias)).sum(0, dtype=magnitude.dtype)  # y is linear in it
            dm = torch.where(magnitude == 0, 0, dm / magnitude)
        dA = ((g @ Bt_c.t()).t() @ x).to(A.dtype) if need_A else None
        return g @ W_c if need_x else None, g.sum(0) if need_bias else None, dA, dB, None, dm, *dWs


def low_rank_gradients_pay(tokens: int, parts: Sequence[LowRankLinear]) -> bool:
    """Return whether the gradients of A and B are best computed from the tokens, by low-rank matmuls, rather than from
    the gradient of the effective weight.

    From the tokens it takes 4 low-rank matmuls (2 where A does not train), as wide as the As together and as costly as
    16 columns where that is less, but no matmul of the size of the weight's gradient; a dozen small operations come on
    top. `docs/design.md` has the measurements.
    """
    As, size = [part.A for part in parts], sum(part.W.numel() for part in parts)
    rank = sum(len(A) for A in {storage_key(A): A for A in As}.values())
    around = As[0].shape[1] + sum(len(part.W) for part in parts)
    matmuls = 4 if As[0].requires_grad else 2
    return tokens * (size - matmuls * max(16, rank) * around) > MIN_SAVED


def needs_adding(W: Tensor, dtype: torch.dtype) -> bool:
    """Return whether small changes of W would be lost in an effective weight, for matmuls in this dtype.

    A weight with digits below the dtype's rounds either way, and the mean is right. One that is stored as coarsely
    rounds back to itself: in bf16, 6 % of a change of 1e-4 of the weight arrives, and 53 % of one of 1e-3.
    """
    return W.dtype.itemsize < 4 and dtype.itemsize < 4


FEW = 64  # tokens up to which the sum is made of products in fp32, on CUDA: copies of the weight would cost more


def _rounds_first(x: Tensor) -> bool:
    """Return whether a matmul that accumulates on a tensor rounds its own product before it adds it: so cuBLAS does in
    half precision (measured on an H200), and others may."""
    return x.device.type != "cpu" and x.dtype.itemsize < 4


def added_product(x: Tensor, low: Tensor, W: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + low B^T + bias (tokens, out), all in one dtype, where the two products are summed before rounding.

    If x W^T was rounded first, as little of a small low-rank product would arrive as of a small change in a rounded
    weight. On the CPU the matmul with W accumulates on the low-rank product; where that rounds too, both are one
    matmul of concatenated factors, which costs a copy of W.
    """
    if not _rounds_first(x):
        return added_to_product(F.linear(low, B), x, W, bias)
    if x.device.type == "cuda" and len(x) <= FEW:
        both = (torch.mm(left, right.t(), out_dtype=torch.float32) for left, right in ((x, W), (low, B)))
        y = sum(both).to(x.dtype)
    else:
        y = F.linear(torch.cat((x, low), 1), torch.cat((W, B), 1))
    return y if bias is None else y.add_(bias)


def added_to_product(added: Tensor, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + added (tokens, out) + bias, all in one dtype, where the first two are summed before rounding;
    `added` is overwritten."""
    if not _rounds_first(x):
        y = added.addmm_(x, W.t())
    elif x.device.type == "cuda":
        y = torch.mm(x, W.t(), out_dtype=torch.float32).add_(added).to(x.dtype)
    else:
        y = (x.float() @ W.float().t()).add_(added).to(x.dtype)
    return y if bias is None else y.add_(bias)


class AddedLinear(torch.autograd.Function):
    """Compute several linears with low-rank updates of one x (tokens, in), each output (tokens, out) in x's dtype.

    Called with x, the dropout probability on the updates' input, and W, bias, A, B and scale of each linear in turn.
    They share one dropout mask. The matmuls with the As are one, and nothing of W's size is made or kept.
    """

    @staticmethod
    def forward(ctx, x, p, *flat):
        Ws, biases, As, Bs, scales = (flat[i::5] for i in range(5))
        drop = Dropout.of(x, p)
        x_low = kept(x, drop.mask(x))
        A_c = torch.cat([(A * drop.scale if p else A).to(x.dtype) for A in As])
        Bs_c = [(B * scale).to(x.dtype) for B, scale in zip(Bs, scales, strict=True)]
        Ws_c = [W if forgotten(W) else W.to(x.dtype) for W in Ws]
        low = x_low @ A_c.t()  # (tokens, rank): this way round it reads rows
        lows = low.split([len(A) for A in As], 1)
        ys = tuple(
            added_product(x, *each) for each in zip(lows, (W.to(x.dtype) for W in Ws_c), Bs_c, biases, strict=True)
        )
        ctx.save_for_backward(x, low, A_c, drop.drawn, *Ws_c, *Bs_c)
        ctx.p, ctx.ranks, ctx.scales = p, [len(A) for A in As], scales
        ctx.dtypes = [(W.dtype, A.dtype) for W, A in zip(Ws, As, strict=True)]
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs):
        x, low, A_c, drawn, *rest = ctx.saved_tensors
        n, needs = len(gs), ctx.needs_input_grad
        Ws_c, Bs_c, drop = rest[:n], rest[n:], Dropout(drawn, ctx.p)
        mask = drop.mask(x)
        low_gs = torch.cat([g @ B_c for g, B_c in zip(gs, Bs_c, strict=True)], 1)  # (tokens, rank)
        dx = None
        if needs[0] and mask is None and _rounds_first(A_c):
            dx = torch.cat((low_gs, *gs), 1) @ torch.cat((A_c, *(W.to(A_c.dtype) for W in Ws_c)))
        elif needs[0]:
            dx = kept_(low_gs @ A_c, mask)
            for g, W_c in zip(gs, Ws_c, strict=True):
                dx.addmm_(g, W_c.to(g.dtype))
        dAs = [None] * n
        if any(needs[4::5]):
            dAs = (low_gs.t() @ kept(x, mask)).mul_(drop.scale).split(ctx.ranks)
        found = []
        for i, (g, dA, low_i, scale) in enumerate(zip(gs, dAs, low.split(ctx.ranks, 1), ctx.scales, strict=True)):
            need_W, need_bias, need_A, need_B, _ = needs[2 + 5 * i : 7 + 5 * i]
            W_dtype, dtype = ctx.dtypes[i]
            found += [(g.t() @ x).to(W_dtype) if need_W else None, g.sum(0) if need_bias else None]
            found += [dA.to(dtype) if need_A else None]
            found += [(low_i.t() @ g).t().to(dtype) * scale if need_B else None, None]
        return dx, None, *found


def _added(x: Tensor, parts: Sequence[LowRankLinear], p: float) -> list[Tensor]:
    """Apply LoRA linears to x (tokens, in) by `AddedLinear`; a magnitude scales the outputs afterwards."""
    biases = [None if part.bias is None else part.bias.to(x.dtype) for part in parts]
    early = [bias if part.magnitude is None else None for part, bias in zip(parts, biases, strict=True)]
    flat = [[part.W, bias, part.A, part.B, part.scale] for part, bias in zip(parts, early, strict=True)]
    ys = list(AddedLinear.apply(x, p, *itertools.chain(*flat)))
    for i, (part, bias) in enumerate(zip(parts, biases, strict=True)):
        if part.magnitude is not None:
            ys[i] = ys[i] * part.row_scale(part.updated_weight())[:, 0].to(x.dtype)
            ys[i] = ys[i] if bias is None else ys[i] + bias
    return ys


def lora_linear(x: Tensor, parts: Sequence[LowRankLinear], p: float = 0.0) -> list[Tensor]:
    """Apply LoRA linears to one input. Differentiable in all but `scale`; a frozen W costs no gradient.

    x: (..., in), in the compute dtype. p: dropout probability on the updates' input. Returns the output (..., out) of
    each, in x's dtype, or one that is theirs, concatenated.
    """
    with torch.autocast(x.device.type, enabled=False):  # every dtype is chosen here already
        tokens = x.reshape(-1, x.shape[-1])
        if p or any(needs_adding(part.W, x.dtype) for part in parts):
            return [y.view(*x.shape[:-1], y.shape[-1]) for y in _added(tokens, parts, p)]
        bias = cat_or_none([part.bias for part in parts])
        bias = None if bias is None else bias.to(x.dtype)
        if low_rank_gradients_pay(len(tokens), parts) or any(isinstance(part.W, Quantized) for part in parts):
            y = EffectiveLinear.apply(tokens, bias, *fused_update(parts), *(part.W for part in parts))
        else:
            dtype = x.dtype  # what makes the weight again must not hold x

            def weight() -> Tensor:
                return cat_or_none([part.effective_weight() for part in parts]).to(dtype)

            y = F.linear(tokens, recomputable(weight(), weight), bias)
        return [y.view(*x.shape[:-1], y.shape[-1])]
