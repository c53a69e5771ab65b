"""Rotary positions: pairs of a head's values are turned by an angle that grows with the position.

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864. As in Hugging Face's
models the pairs are (i, i + D / 2). Shapes: B batch, T positions, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora.functional import at_least_fp32
from models.config import ModelConfig


def _frequencies(config: ModelConfig) -> Tensor:
    """The angle by which each pair is turned a position, (D / 2,), in fp32."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.int64).float() / config.head_width
    return _scaled(1 / config.rope_theta**exponents, config.rope_scaling)


def _scaled(frequencies: Tensor, scaling: Mapping | None) -> Tensor:
    """Frequencies for contexts longer than a model was first trained on.

    `linear` (Chen et al. 2023, arXiv 2306.15595) slows all of them; `llama3` (Llama 3.1) slows those that turn less
    than low_freq_factor times in the old context, leaves those that turn more than high_freq_factor times, and goes
    from the one to the other in between.
    """
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * slowed + kept * frequencies


class Rotary:
    """cos and sin of the angles of a config, by position, made once for as many positions as were asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.table: tuple[Tensor, Tensor] | None = None  # (positions, 1, D / 2) each, in fp32

    def at(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin (*positions.shape, 1, D / 2) for positions, on whose device they are, of less than `longest`."""
        if self.table is None or len(self.table[0]) < longest or self.table[0].device != positions.device:
            room = min(self.config.max_positions, max(256, 2 ** (longest - 1).bit_length()))
            angles = torch.arange(room)[:, None].float() * _frequencies(self.config)
            with torch.inference_mode(False):
                self.table = tuple(t[:, None].to(positions.device) for t in (angles.cos(), angles.sin()))
        cos, sin = self.table
        return cos[positions], sin[positions]


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D / 2) by the angle of its position; in fp32, rounded once. cos, sin: of `Rotary.at`."""
    return Rotation.apply(x_BTHD, cos, sin) if x_BTHD.requires_grad else Rotation.turned(x_BTHD, cos, sin, 1)


class Rotation(torch.autograd.Function):
    """`rotate`. What it does to gradients is to turn them back, which autograd would make of nine operations."""

    @staticmethod
    def forward(ctx, x_BTHD, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotation.turned(x_BTHD, cos, sin, 1)

    @staticmethod
    def turned(x_BTHD, cos, sin, sign):
        a, b = at_least_fp32(x_BTHD).chunk(2, -1)
        a, b = (a * cos).addcmul_(b, sin, value=-sign), (b * cos).addcmul_(a, sin, value=sign)
        return torch.cat((a, b), -1).to(x_BTHD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_BTHD):
        return Rotation.turned(g_BTHD, *ctx.saved_tensors, -1), None, None
