"""What the optimizer is made of."""

from __future__ import annotations

import torch
from torch import nn


def make_optimizer(model: nn.Module, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """Fused AdamW over everything that trains, with decay on matrices only, as in nanoGPT.

    An adapter's tensors and a full model's weights go through the same groups. The rate is set before each step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, fused=True)
