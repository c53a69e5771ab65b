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

ENOUGH = 40e6  # multiplications that must be saved: see `thin_products_pay`


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def kept_by_dropout(like: Tensor, p: float) -> tuple[Tensor, float]:
    """Which elements of a tensor on the CPU dropout keeps, each with probability 1 - p, and what to multiply those by.

    There torch draws one number after the other, 6 ns each, which would take longer than the rest of a small
    model's step; here 64 random bits serve four elements, so that p is rounded to a multiple of 2^-16.
    """
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


def lengths(V: Tensor) -> Tensor:
    """The norm of each row (out,), without a gradient; a row of zeros counts as short, so that it can be divided by."""
    return torch.linalg.vector_norm(V.detach(), dim=1).clamp_min(torch.finfo(V.dtype).tiny)


class LowRank(NamedTuple):
    """A linear with a low-rank update, x V^T + bias where V = W + scale B A; with a magnitude, each row of V is brought
    to that length, and no gradient flows through the length that it had.

    W: (out, in). bias: (out,) or None. A: (rank, in). B: (out, rank). magnitude: (out,) or None.
    """

    W: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    def stretch(self, V: Tensor) -> Tensor | None:
        """What each row of V is multiplied by, (out, 1); None where there is no magnitude."""
        if self.magnitude is None:
            return None
        return (self.magnitude / lengths(V).to(self.magnitude.dtype))[:, None]

    def directions(self) -> Tensor:
        """V (out, in), in W's dtype; differentiable."""
        return torch.addmm(self.W, self.B.to(self.W.dtype), self.A.to(self.W.dtype), alpha=self.scale)

    def effective_weight(self) -> Tensor:
        """The weight that all this stands for, in W's dtype; differentiable."""
        V = self.directions()
        stretch = self.stretch(V)
        return V if stretch is None else V * stretch.to(V.dtype)


def concatenated(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The biases, or magnitudes, of linears of one kind, one after the other; None where they have none."""
    return tensors[0] if len(tensors) == 1 or tensors[0] is None else torch.cat(tensors)


def _is_one(tensors: Sequence[Tensor]) -> bool:
    """Whether these are the same values in the same place, as shared tensors are."""
    return len({(t.data_ptr(), t.shape, t.stride()) for t in tensors}) == 1


def stacked(parts: Sequence[LowRank]) -> LowRank:
    """Linears that share their input as one, whose output is theirs one after the other: the As stand under each
    other, the scaled Bs are the blocks of a diagonal; or they share their A too, and the scaled Bs stand under each
    other."""
    if len(parts) == 1:
        return parts[0]
    Ws, biases, As, Bs, scales, magnitudes = zip(*parts, strict=True)
    Bs = [B if scale == 1 else B * scale for B, scale in zip(Bs, scales, strict=True)]
    A, B = (As[0], torch.cat(Bs)) if _is_one(As) else (torch.cat(As), torch.block_diag(*Bs))
    return LowRank(torch.cat(Ws), concatenated(biases), A, B, 1.0, concatenated(magnitudes))


class EffectiveLinear(torch.autograd.Function):
    """y of a `LowRank` for x (tokens, in); called with x and its fields.

    x comes in the compute dtype; the weight is summed in W's own, so that no small change is rounded away twice.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, magnitude):
        part = LowRank(W, bias, A, B, scale, magnitude)
        V = part.directions()
        stretch = part.stretch(V)
        if stretch is not None:
            V, B = V * stretch.to(V.dtype), B * stretch
        A_c, Bt_c = A.to(x.dtype), (B * scale).to(x.dtype).t().contiguous()  # (rank, out): the rows backward reads
        W_c = V.to(x.dtype)
        y = F.linear(x, W_c, bias)
        ctx.save_for_backward(x, W_c, A_c, Bt_c, *(() if stretch is None else (stretch, magnitude, y, bias)))
        ctx.scale, ctx.dtypes = scale, (A.dtype, W.dtype)
        return y

    @staticmethod
    @once_differentiable  # a second derivative would miss what flows through the copies
    def backward(ctx, g):
        x, W_c, A_c, Bt_c, *stretched = ctx.saved_tensors
        need_x, need_W, need_bias, need_A, *_ = ctx.needs_input_grad
        low = x @ A_c.t()  # (tokens, rank): this way round it reads rows
        dW = (g.t() @ x).to(ctx.dtypes[1]) if need_W else None
        dB, dm = (low.t() @ g).t().to(ctx.dtypes[0]) * ctx.scale, None
        if stretched:
            stretch, magnitude, y, bias = stretched
            dB, dW = dB * stretch, None if dW is None else dW * stretch.to(dW.dtype)
            dm = (g * (y if bias is None else y - bias)).sum(0, dtype=magnitude.dtype)  # y is linear in it
            dm = torch.where(magnitude == 0, 0, dm / magnitude)
        dA = ((g @ Bt_c.t()).t() @ x).to(ctx.dtypes[0]) if need_A else None
        return g @ W_c if need_x else None, dW, g.sum(0) if need_bias else None, dA, dB, None, dm


def thin_products_pay(tokens: int, parts: Sequence[LowRank]) -> bool:
    """Whether gradients of A and B are taken from the tokens, and not from the gradient of the effective weight.

    From the tokens it is 4 thin products (2 where A does not train), as wide as the As together and of the cost of 16
    where that is less, and no product of the size of the weight's gradient; in exchange a dozen small operations more
    go with them. On 2 cores with AVX512_BF16, forward and backward in ms from the tokens / from the weight, for weights
    (in, out) at rank 8: (128, 128) with 4,096 tokens 1.78 / 1.56 in bf16 and 3.27 / 2.97 in fp32; (128, 512) with 1,024
    tokens 1.78 / 1.60 and 2.98 / 3.11, with 2,048 tokens 2.57 / 2.70 and 5.14 / 5.82; (384, 1536) with 2,048 tokens
    16.3 / 22.1 and 32.1 / 42.4. A whole VeRA step with 4,096 tokens in bf16, all from the tokens / all from the weight,
    LoRA's at rank 8 being 1, with 3.2M and 10.7M parameters: at rank 64 1.06 / 1.17 and 1.03 / 1.21, at rank 256
    1.30 / 1.20 and 1.30 / 1.34.
    """
    As, size = [part.A for part in parts], sum(part.W.numel() for part in parts)
    thin = sum(len(A) for A in (As[:1] if _is_one(As) else As))
    around = As[0].shape[1] + sum(len(part.W) for part in parts)
    products = 4 if As[0].requires_grad else 2
    return tokens * (size - products * max(16, thin) * around) > ENOUGH


def lora_linear(x: Tensor, *parts: LowRank) -> Tensor:
    """LoRA linears of one input, differentiable in everything but scale; a frozen W costs no gradient.

    x: (..., in), in the compute dtype. Returns (..., sum of out) in x's dtype, the linears' outputs side by side.
    """
    with torch.autocast(x.device.type, enabled=False):  # dtypes are settled: nothing is to be cast behind our back
        if thin_products_pay(x.numel() // x.shape[-1], parts):
            whole = stacked(parts)
            whole = whole._replace(bias=None if whole.bias is None else whole.bias.to(x.dtype))
            y = EffectiveLinear.apply(x.reshape(-1, x.shape[-1]), *whole)
            return y.view(*x.shape[:-1], len(whole.W))
        bias, weights = concatenated([part.bias for part in parts]), [part.effective_weight() for part in parts]
        return F.linear(x, concatenated(weights).to(x.dtype), None if bias is None else bias.to(x.dtype))


def lora_linear_as_written(x: Tensor, part: LowRank, p: float = 0.0) -> Tensor:
    """The papers' own formula, x W^T + scale dropout(x) A^T B^T, stretched where there is a magnitude, + bias: what
    dropout needs, since no weight can stand for it. `p` is dropout's probability on the adapter's input."""
    W, bias, A, B, scale, magnitude = part
    with torch.autocast(x.device.type, enabled=False):
        low = F.linear(dropout(x, p), A.to(x.dtype)).reshape(-1, len(A))
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x, W.to(x.dtype), bias if magnitude is None else None)
        y = torch.addmm(y.view(-1, len(W)), low, (scale * B).to(x.dtype).t()).view(y.shape)
        if magnitude is None:
            return y
        y = y * part.stretch(part.directions())[:, 0].to(x.dtype)
        return y if bias is None else y + bias
