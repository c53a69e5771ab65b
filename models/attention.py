"""Causal attention over whole sequences, and which way to compute it where.

Shapes: B batch, T positions, H heads, K heads of keys and values, S = H / K, D head width, N = B K.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora.layers.dropout import Dropout
from runtime.training.recompute import recomputing

# Queries that are taken at once on the CPU. Of the keys, those after the last of them are never looked at, which
# saves 1/4 of all work with two blocks and 3/8 with four; smaller blocks lose it again to more and smaller matmuls.
BLOCK = 128

# On the CPU torch's fused kernel has a slow backward: with 4,096 tokens of 6 heads, 64 wide, forward and backward by
# blocks took 0.49 of its time at T = 256 in bf16 and 0.60 at 1,024; in fp32 0.87 and 0.90 (2 cores, AVX512_BF16).
# Beyond this length the weights that blocks keep, (N, T, T) / 2 of them, cost more memory than they are worth.
LONGEST_BY_BLOCKS = 1024

# On CUDA, cuDNN's kernel, which torch prefers on recent GPUs, is made anew for each length: a step of a length that has
# not come yet took 105 ms with it and 25 without (10.7M parameters, H200). So it is for lengths that are multiples of
# this, as those of windows of text are, and not for all that records may have. It is 2 to 5 % of a step faster (1B).
USUAL_LENGTHS = 64
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, dropout: float, segments_BT: Tensor | None = None
) -> Tensor:
    """Each position attends to itself and what is before it: (B, H, T, D). With segments, only to what is in its own.

    H / K heads after one another share their keys and values. `dropout` is the probability on the attention weights.
    On the CPU there may be fewer queries than keys: those of the last positions, up to LONGEST_BY_BLOCKS of them.
    """
    shared = q_BHTD.shape[1] // k_BKTD.shape[1]
    # A graph that is exported is for any length, and a loop over blocks would be fixed at that of the example.
    if torch.compiler.is_exporting() or q_BHTD.device.type != "cpu" or q_BHTD.shape[2] > LONGEST_BY_BLOCKS:
        k_BHTD, v_BHTD = (t if shared == 1 else t.repeat_interleave(shared, 1) for t in (k_BKTD, v_BKTD))
        seen = None if segments_BT is None else _seen(segments_BT)
        with kernels(q_BHTD.device.type, q_BHTD.shape[2]):
            return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, seen, dropout, is_causal=seen is None)
    q = q_BHTD.unflatten(1, (-1, shared)).flatten(0, 1).contiguous()
    k, v = (t.flatten(0, 1).contiguous() for t in (k_BKTD, v_BKTD))
    with torch.autocast("cpu", enabled=False):  # a softmax in the matmuls' own dtype, as the fused kernels do
        return AttentionByBlocks.apply(q, k, v, dropout, segments_BT).view(q_BHTD.shape)


def kernels(device: str, length: int) -> AbstractContextManager:
    """Inside, torch chooses among the kernels that are fast for rows of this length."""
    return nullcontext() if device != "cuda" or length % USUAL_LENGTHS == 0 else sdpa_kernel(ANY_LENGTH)


def _seen(segments_BT: Tensor) -> Tensor:
    """(B, 1, T, T): which positions (last) each one may look at."""
    same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()


def _hidden(segments: Tensor | None, a: int, b: int, q: Tensor) -> Tensor:
    """(N, S (b - a), b): -inf on what the queries from a to b may not look at, which is what comes after each, and
    other segments; else 0."""
    found = torch.full((1, b - a, b), -math.inf, dtype=q.dtype).triu_(a + 1)
    if segments is not None:
        found = found.masked_fill(segments[:, a:b, None] != segments[:, None, :b], -math.inf)
        found = found.repeat_interleave(len(q) // len(segments), 0)
    return found.repeat(1, q.shape[1], 1).expand(len(q), -1, -1)


class AttentionByBlocks(torch.autograd.Function):
    """softmax(q k^T / sqrt(D), causal) v, a block of queries after the other. q: (N, S, T, D); k and v: (N, T, D), or
    longer, as the queries are those of the last positions.

    The S heads that share keys and values are one matmul's rows. segments: (B, T), or None.
    """

    @staticmethod
    def forward(ctx, q, k, v, dropout, segments):
        y, saved, ctx.p, keep = torch.empty_like(q), [], dropout, not recomputing()
        for a in range(0, q.shape[2], BLOCK):
            P = AttentionByBlocks.weights(q, k, segments, a)
            drop, y_block = Dropout.of(P, dropout), y[:, :, a : a + BLOCK]
            y_block.copy_((drop.apply(P, drop.mask(P)) @ v[:, : P.shape[2]]).view(y_block.shape))
            saved += P if keep else None, drop.drawn
        ctx.save_for_backward(q, k, v, segments, *saved)
        return y

    @staticmethod
    def weights(q, k, segments, a):
        """The softmax (N, S (b - a), b) of the block of queries that begins at a, and is at the positions from a to b
        where the queries are those of all positions."""
        q_block = q[:, :, a : a + BLOCK]
        a += k.shape[1] - q.shape[2]
        b = a + q_block.shape[2]
        hidden, keys = _hidden(segments, a, b, q), k[:, :b].transpose(1, 2)
        return torch.baddbmm(hidden, q_block.flatten(1, 2), keys, alpha=q.shape[-1] ** -0.5).softmax(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, segments, *saved = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, a in enumerate(range(0, q.shape[2], BLOCK)):
            P, drop = saved[2 * i], Dropout(saved[2 * i + 1], ctx.p)
            P = AttentionByBlocks.weights(q, k, segments, a) if P is None else P
            mask, b, dq_block = drop.mask(P), P.shape[2], dq[:, :, a : a + BLOCK]
            q_block, g_block = (t[:, :, a : a + BLOCK].flatten(1, 2) for t in (q, g))
            dP = drop.apply(g_block @ v[:, :b].transpose(1, 2), mask)
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype).mul_(q.shape[-1] ** -0.5)
            dq_block.copy_((dS @ k[:, :b]).view(dq_block.shape))
            dk[:, :b] += dS.transpose(1, 2) @ q_block
            dv[:, :b] += drop.apply(P, mask).transpose(1, 2) @ g_block
        return dq, dk, dv, None, None
