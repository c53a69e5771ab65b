"""What training takes beside the model: the optimizer, and what variants add to a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lora.attach import hosts
from lora.variants.lora import LoRA


def active_variants(model: nn.Module) -> dict[type[LoRA], list[LoRA]]:
    """The active adapters' tensors on the model's linears, by variant."""
    found: dict[type[LoRA], list[LoRA]] = {}
    for host in hosts(model).values():
        for entry in host.entries():
            if isinstance(entry, LoRA):
                found.setdefault(type(entry), []).append(entry)
    return found


def make_optimizer(
    model: nn.Module, betas: tuple[float, float], weight_decay: float, lora_plus_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """Fused AdamW over everything that trains, with decay on matrices only, as in nanoGPT.

    An adapter's tensors and a full model's weights go through the same groups; their rate is set before each step.
    The tensors that a variant declares fast (B) learn `lora_plus_ratio` times as fast as all others: Hayou et al.
    2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
    """
    fast = {p for entries in active_variants(model).values() for entry in entries for p in entry.fast_parameters()}
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


def extra_losses(model: nn.Module) -> list[Callable[[], Tensor]]:
    """What the model's active variants add to the loss of a step, each () when called."""
    variants = active_variants(model).items()
    return [partial(variant.extra_loss, entries) for variant, entries in variants if variant.extra_loss]


def after_steps(model: nn.Module, steps: int) -> list[Callable[[int], None]]:
    """What they do after each of `steps` updates, called with its number while the gradients are still there."""
    variants = active_variants(model).items()
    hooks = [(variant.after_step, entries) for variant, entries in variants if variant.after_step]
    return [lambda step, hook=hook, entries=entries: hook(entries, step, steps) for hook, entries in hooks]
