"""The loss over a large vocabulary, a chunk of positions at a time, so that all logits never stand at once.

Shapes: N positions, C embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora.functional import compute_dtype
from lora.layers.linear import is_plain
from runtime.training.batch import IGNORED

# Logits that may stand at once: 8 MB in fp32 on the CPU, where smaller chunks take no longer, more elsewhere.
WHOLE, WHOLE_ON_ACCELERATORS = 2**21, 2**23
SHARE, FEWEST = 4, 64  # see `chunk_rows`


def whole(device: torch.device) -> int:
    """How many logits may stand at once on this device."""
    return WHOLE if device.type == "cpu" else WHOLE_ON_ACCELERATORS


def chunk_rows(device: torch.device, width: int, vocab_size: int, trained: bool) -> int:
    """How many positions make a chunk, for a head of this width that trains or does not.

    Each chunk of one that trains converts all its weights and adds to all their gradients, so with a few rows that is
    most of the work: at 124M parameters, a vocabulary of 50,304, a step of 1,024 tokens took 1.94 s with 41 rows a
    chunk and 1.45 with 192 (2 cores, bf16), whose logits take a quarter of what the head's weights do. A product with
    fewer than 64 rows is slow with any head.
    """
    return max(FEWEST, whole(device) // vocab_size, width // SHARE if trained else 1)


Head = Callable[[Tensor], Tensor]  # (N, C) -> logits (N, V)


def _total(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies, and the logarithms of the probabilities (N, V) in fp32."""
    logs_NV = logits_NV.float().log_softmax(-1)
    return F.nll_loss(logs_NV, targets_N, reduction="sum"), logs_NV


def _gradient(logs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The gradient of the sum with respect to the logits, in the place of `logs_NV`: autograd's own takes two more
    passes over (N, V)."""
    counted, chosen_N1 = (targets_N != IGNORED)[:, None], targets_N.clamp(min=0)[:, None]
    return logs_NV.exp_().scatter_add_(1, chosen_N1, -torch.ones_like(chosen_N1, dtype=logs_NV.dtype)).mul_(counted)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of cross-entropies; called with x, targets, the head, the rows of a chunk, and what trains in the head.

    Gradients are made together with the loss, while a chunk's logits are there.
    """

    @staticmethod
    def forward(ctx, x_NC, targets_N, head, rows, *parameters):
        total = x_NC.new_zeros((), dtype=torch.float32)
        frozen = None if parameters else frozen_weight(head, x_NC)
        dx_NC, gradients = torch.empty_like(x_NC), [torch.zeros_like(p) for p in parameters]
        for x, dx, targets in zip(x_NC.split(rows), dx_NC.split(rows), targets_N.split(rows), strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                logits = F.linear(x, *frozen) if frozen else head(x)
                loss, logs = _total(logits.detach(), targets)
                found = torch.autograd.grad(logits, (x, *parameters), _gradient(logs, targets).to(logits.dtype))
            total += loss
            dx.copy_(found[0])
            for whole, part in zip(gradients, found[1:], strict=True):
                whole += part
        ctx.save_for_backward(dx_NC, *gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx_NC, *gradients = ctx.saved_tensors
        return dx_NC * g.to(dx_NC.dtype), None, None, None, *(gradient * g.to(gradient.dtype) for gradient in gradients)


def frozen_weight(head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of a head without an adapter in the dtype of x, so that they are converted once for all
    chunks; None for a head that computes anything else, and where x is not in the dtype of matmuls."""
    if not is_plain(head) or head.variants() or compute_dtype(x) != x.dtype:
        return None
    return head.dense_weight(x.dtype), head.bias_in(x.dtype)


def chunked_cross_entropy(x_BTC: Tensor, targets_BT: Tensor, head: nn.Module, vocab_size: int) -> Tensor:
    """What `mean_cross_entropy` returns of head(x), without holding all logits."""
    x_NC, targets_N = x_BTC.flatten(0, 1), targets_BT.flatten()
    trained = trains(head)
    rows = chunk_rows(x_BTC.device, x_BTC.shape[-1], vocab_size, bool(trained))
    if torch.is_grad_enabled() and (x_NC.requires_grad or trained):
        total = ChunkedCrossEntropy.apply(x_NC, targets_N, head, rows, *trained)
    else:
        parts = zip(x_NC.split(rows), targets_N.split(rows), strict=True)
        total = torch.stack([_total(head(x), targets)[0] for x, targets in parts]).sum()
    return total / (targets_N != IGNORED).sum().clamp(min=1)


def trains(head: nn.Module) -> Sequence[nn.Parameter]:
    """The parameters of the head that train, an adapter's among them."""
    return [p for p in head.parameters() if p.requires_grad]
