"""The loss over a large vocabulary, a chunk of positions at a time, so that all logits never stand at once.

Shapes: N positions, C embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from runtime.training.batch import IGNORED

WHOLE = 2**23  # logits that may stand at once: 32 MB in fp32

Head = Callable[[Tensor], Tensor]  # (N, C) -> logits (N, V)


def _total(x_NC: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head(x_NC).float(), targets_N, reduction="sum")


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of cross-entropies; called with x, targets, the head, the rows of a chunk, and what trains in the head.

    Gradients are made together with the loss, while a chunk's logits are there.
    """

    @staticmethod
    def forward(ctx, x_NC, targets_N, head, rows, *parameters):
        total = x_NC.new_zeros((), dtype=torch.float32)
        dx_NC, gradients = torch.empty_like(x_NC), [torch.zeros_like(p) for p in parameters]
        for x, dx, targets in zip(x_NC.split(rows), dx_NC.split(rows), targets_N.split(rows), strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                loss = _total(x, targets, head)
                found = torch.autograd.grad(loss, (x, *parameters))
            total += loss.detach()
            dx.copy_(found[0])
            for gradient, part in zip(gradients, found[1:], strict=True):
                gradient += part
        ctx.save_for_backward(dx_NC, *gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx_NC, *gradients = ctx.saved_tensors
        return dx_NC * g.to(dx_NC.dtype), None, None, None, *(gradient * g.to(gradient.dtype) for gradient in gradients)


def chunked_cross_entropy(x_BTC: Tensor, targets_BT: Tensor, head: nn.Module, vocab_size: int) -> Tensor:
    """What `mean_cross_entropy` returns of head(x), without holding all logits."""
    x_NC, targets_N = x_BTC.flatten(0, 1), targets_BT.flatten()
    rows, trained = max(1, WHOLE // vocab_size), trains(head)
    if torch.is_grad_enabled() and (x_NC.requires_grad or trained):
        total = ChunkedCrossEntropy.apply(x_NC, targets_N, head, rows, *trained)
    else:
        parts = zip(x_NC.split(rows), targets_N.split(rows), strict=True)
        total = torch.stack([_total(x, targets, head) for x, targets in parts]).sum()
    return total / (targets_N != IGNORED).sum().clamp(min=1)


def trains(head: nn.Module) -> Sequence[nn.Parameter]:
    """The parameters of the head that train, an adapter's among them."""
    return [p for p in head.parameters() if p.requires_grad]
