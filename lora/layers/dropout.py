"""Dropout whose mask takes less time than a matmul, and need not be kept for the backward pass.

On the CPU torch draws one number after the other, 6 ns each, which would take longer than the rest of a small model's
step. Here a mask is hashed from a few random numbers, for many elements at once, and what is dropped is cleared by a
bitwise AND.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHANCES = 2**16  # p is rounded to a multiple of 1 / CHANCES
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as a value, by its bytes
COLUMNS = 1024  # words that share their row's two numbers
ROWS = 512  # that are hashed at once, so that they stay in a core's cache


class Dropout(NamedTuple):
    """Which elements of a tensor are kept, each with probability 1 - p, and what those are multiplied by.

    drawn: on the CPU the random numbers that a mask is made of, elsewhere the mask; None for p = 0, where all are kept.
    """

    drawn: Tensor | None
    p: float

    @classmethod
    def of(cls, like: Tensor, p: float) -> Dropout:
        """Draw from torch's generator, nothing where none is dropped."""
        if not cls(None, p).dropped:
            return cls(None, 0.0)
        if like.device.type != "cpu":
            mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
            return cls(mask.bernoulli_(1 / cls(None, p).scale), p)
        rows = -(-like.numel() * _size(like) // (4 * COLUMNS))
        return cls(torch.empty(COLUMNS + 2 * rows, dtype=torch.int32).random_(-(2**31), 2**31), p)

    @property
    def dropped(self) -> int:
        """Of CHANCES elements, how many are dropped on average."""
        return min(round(self.p * CHANCES), CHANCES - 1)

    @property
    def scale(self) -> float:
        """What the elements that are kept are multiplied by, so that the mean stays."""
        return CHANCES / (CHANCES - self.dropped)

    def mask(self, like: Tensor) -> Tensor | None:
        """Return the mask of a tensor of this shape and dtype: booleans, but on the CPU integers as wide as its values
        with all bits set where one is kept; None for p = 0.

        Words of 32 bits are hashed by Dietzfelbinger et al. 1997, "A reliable randomized algorithm for the closest-pair
        problem": (column ^ key) * multiplier, of which the upper bits count; each row has a key and a multiplier.
        """
        if self.drawn is None or self.drawn.dtype == torch.bool:
            return self.drawn
        bits, integers = 8 * _size(like), INTEGERS[_size(like)]
        columns, keys, multipliers = self.drawn.tensor_split((COLUMNS, (COLUMNS + len(self.drawn)) // 2))
        mask = torch.empty(len(keys), COLUMNS, dtype=torch.int32)
        least = 2 ** (bits - 1) - (self.dropped << (bits - 16))
        for part, key, multiplier in zip(*(t.split(ROWS) for t in (mask, keys, multipliers)), strict=True):
            torch.bitwise_xor(columns, key[:, None], out=part).mul_(multiplier[:, None] | 1)
            if bits == 16:  # two values a word, of which the lower half is not as random
                part.bitwise_xor_((part >> 16).bitwise_and_(0xFFFF))
            part.view(integers).clamp_(least - 1, least).sub_(least)
        return mask.view(integers).flatten()[: like.numel()].view(like.shape).to(INTEGERS[like.dtype.itemsize])

    def apply(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return x as dropout by this mask leaves it; for p = 0, x itself."""
        return x if mask is None else kept(x, mask).mul_(self.scale)


def _size(like: Tensor) -> int:
    """Return how many bytes of a word are for one value: its own, but not more than a word has."""
    return min(4, like.dtype.itemsize)


def kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x with 0 where a mask says so, not scaled; for None, x itself."""
    if mask is None or mask.dtype == torch.bool:
        return x if mask is None else x * mask
    return (x.view(mask.dtype) & mask).view(x.dtype)


def kept_(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return `kept` in the place of x."""
    if mask is not None:
        (x.mul_ if mask.dtype == torch.bool else x.view(mask.dtype).bitwise_and_)(mask)
    return x


class _Dropped(torch.autograd.Function):
    """`dropout`, which keeps nothing but what its mask is made of."""

    @staticmethod
    def forward(ctx, x, p):
        drop = Dropout.of(x, p)
        ctx.save_for_backward(drop.drawn)
        ctx.p = p
        return drop.apply(x, drop.mask(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        drop = Dropout(*ctx.saved_tensors, ctx.p)
        return drop.apply(g, drop.mask(g)), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Apply dropout as `F.dropout` does in training; for p = 0, return x itself."""
    return _Dropped.apply(x, p) if p else x
