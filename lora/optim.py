"""What the optimizer is made of."""

from __future__ import annotations

import torch
from torch import nn

from lora.attach import hosts
from lora.variants import LoRA


def make_optimizer(
    model: nn.Module, betas: tuple[float, float], weight_decay: float, lora_plus_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """Fused AdamW over everything that trains, with decay on matrices only, as in nanoGPT.

    An adapter's tensors and a full model's weights go through the same groups; their rate is set before each step.
    The tensors that a variant declares fast (B) learn `lora_plus_ratio` times as fast as all others: Hayou et al.
    2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
    """
    entries = [entry for host in hosts(model).values() for entry in host.entries() if isinstance(entry, LoRA)]
    fast = {p for entry in entries for p in entry.fast_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            key = (lora_plus_ratio if p in fast else 1.0, weight_decay if p.dim() >= 2 else 0.0)
            groups.setdefault(key, []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "lr_scale": scale, "weight_decay": decay} for (scale, decay), ps in groups.items()],
        betas=betas,
        fused=True,
    )
