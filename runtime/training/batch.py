"""What a step learns from: token ids, what is to be predicted after each, and the loss over what counts."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a target that does not count, as PyTorch's cross_entropy has it


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens, each tensor int64 (B, T).

    targets: the token to predict at each position, or IGNORED. positions and segments, for packed sequences, are handed
    to the model as keyword arguments where they are given.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None

    def _tensors(self) -> dict[str, Tensor]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the model, beside tokens and targets."""
        return {name: t for name, t in self._tensors().items() if name in ("positions", "segments")}

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(**{name: t.to(device, non_blocking=True) for name, t in self._tensors().items()})

    def cut(self, n: int) -> list[Batch]:
        """The rows in `n` parts, whose numbers of rows differ by one at most. Where there are fewer rows than parts,
        those without one have the first row, of which nothing counts."""
        parts = {name: t.tensor_split(n) for name, t in self._tensors().items()}
        cut = [Batch(**dict(zip(parts, part, strict=True))) for part in zip(*parts.values(), strict=True)]
        return [part if len(part.tokens) else cut[0]._uncounted() for part in cut]

    def _uncounted(self) -> Batch:
        return replace(self, targets=torch.full_like(self.targets, IGNORED))

    def count(self) -> Tensor:
        """The number of targets that count, a scalar where the targets are, so that nobody waits for a device."""
        return (self.targets != IGNORED).sum()


def mean_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that count; 0, with gradients of 0, where none does."""
    total = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")
    return total / (targets_BT != IGNORED).sum().clamp(min=1)
