"""A model small enough to write its equations down, its batches, and losses and gradients that go wrong on demand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.device import Machine
from runtime.training.batch import Batch, mean_cross_entropy
from runtime.training.steps import Schedule, Stepper

CPU = Machine(torch.device("cpu"), torch.float32)
VOCABULARY, ROWS, LENGTH = 11, 6, 4
BAD_LOSS, BAD_GRADIENT = 9, 10  # as the first token of a batch


class Fp16(Machine):
    """The CPU with the gradient scaler that fp16 has on CUDA."""

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.0)


class Explode(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient * torch.inf


class Tiny(nn.Module):
    """(x, targets) -> (logits, mean cross-entropy). `frozen` takes part and does not train."""

    def __init__(self, seed: int = 0, dropout: float = 0.5, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.norm = nn.Embedding(VOCABULARY, width), nn.LayerNorm(width)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, VOCABULARY)
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.dropout(self.norm(self.embedding(x) + self.frozen)))
        if x[0, 0] == BAD_GRADIENT:
            logits = Explode.apply(logits)
        loss = mean_cross_entropy(logits, targets)
        return logits, loss + torch.nan if x[0, 0] == BAD_LOSS else loss  # and every gradient is finite


def pair(step: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a step; none of the tokens is a bad one."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, BAD_LOSS, (rows, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def batch(step: int, rows: int = ROWS) -> Batch:
    """The batch of a step."""
    return Batch(*pair(step, rows))


def adamw(model: nn.Module, **options) -> torch.optim.Optimizer:
    """Two groups of parameters, as training has them, and no decay, which hides what a gradient does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2]}, {"params": [p for p in trained if p.dim() < 2]}]
    return torch.optim.AdamW(groups, fused=True, weight_decay=0.0, **options)


def stepper(model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **changes) -> Stepper:
    """Steps on a tiny model with AdamW, a warm-up and a cosine."""
    model = model or Tiny()
    given = {"schedule": Schedule(1e-2, 1e-3, 2, 10), "batch": batch, "machine": CPU, "seed": 5} | changes
    first = (given.pop(name) for name in ("schedule", "batch", "machine"))
    return Stepper(model, optimizer or adamw(model), *first, **given)


def weights(stepper: Stepper) -> dict[str, Tensor]:
    """A copy of all weights and of the optimizer's state."""
    copied = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    for i, p in enumerate(stepper.parameters):
        copied |= {f"{i}/{key}": value.clone() for key, value in stepper.optimizer.state.get(p, {}).items()}
    return copied


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
