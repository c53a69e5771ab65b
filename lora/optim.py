"""The optimizer, and what variants add to a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lora.attach import adaptable_layers
from lora.variants.lora import LoRA
from runtime.errors import UsageError
from runtime.extras import bitsandbytes
from runtime.training import adamw8bit
from runtime.training.adamw import AdamW
from runtime.training.muon import Muon, MuonSettings
from runtime.training.paged_adamw import PagedAdamW

LEAN = {"adamw8bit": adamw8bit.AdamW8bit, "paged_adamw": PagedAdamW}  # AdamW whose moments take less of a device
ADAMW = LEAN | {"adamw": AdamW}  # by OPTIMIZER's names


def active_variants(model: nn.Module) -> dict[type[LoRA], list[LoRA]]:
    """Return the active adapters' modules on the model's linears, by variant."""
    found: dict[type[LoRA], list[LoRA]] = {}
    for layer in adaptable_layers(model).values():
        for module in layer.active_modules():
            if isinstance(module, LoRA):
                found.setdefault(type(module), []).append(module)
    return found


def make_optimizer(
    model: nn.Module,
    betas: tuple[float, float],
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
    kind: str | MuonSettings = "adamw",
) -> torch.optim.Optimizer:
    """Return one of `ADAMW` over everything trainable, with weight decay on matrices only, as in nanoGPT; with
    `MuonSettings`, Muon over the model's `hidden_matrices()` and AdamW over the rest.

    An adapter's tensors and a full model's weights get the same groups. The caller sets their learning rate before each
    step, times the group's `lr_scale`: Muon's `lr_ratio` for its own, `lora_plus_ratio` for a variant's
    `lora_plus_parameters` (B), else 1. Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models",
    arXiv 2402.12354.
    """
    scales = {
        p: lora_plus_ratio
        for modules in active_variants(model).values()
        for module in modules
        for p in module.lora_plus_parameters()
    }
    muon = kind if isinstance(kind, MuonSettings) else None
    hidden = dict.fromkeys(model.hidden_matrices(), muon.lr_ratio) if muon else {}
    scales |= hidden
    groups: dict[tuple, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            decay = weight_decay if p.dim() >= 2 else 0.0
            groups.setdefault((scales.get(p, 1.0), decay, p in hidden), []).append(p)
    rows = [
        {"params": ps, "lr_scale": scale, "weight_decay": decay} | ({"own": True} if inside else {})
        for (scale, decay, inside), ps in groups.items()
    ]
    return Muon(rows, betas, muon.dtype) if muon else ADAMW[kind](rows, betas=betas)


def state_bytes(kind: str, count: int, hidden: bool) -> int:
    """Return the bytes that one of OPTIMIZER's choices keeps of a tensor with so many values, which is or is not one of
    the model's `hidden_matrices()`."""
    if kind == "muon" and hidden:
        return 4 * count
    if kind == "adamw8bit" and count >= adamw8bit.SMALLEST:
        return 2 * (count + 4 * -(-count // adamw8bit.BLOCK))
    return 8 * count


def check_optimizer(name: str, device: torch.device) -> None:
    """Raises UsageError where OPTIMIZER's choice does not work on a device, and UserError without its package."""
    if name not in LEAN:
        return
    works = LEAN[name].devices
    if device.type not in works:
        others = ["adamw", *(other for other in LEAN if device.type in LEAN[other].devices)]
        raise UsageError(
            f"OPTIMIZER={name} works on {' and '.join(works)} only, and this run is on {device.type}; use "
            f"{' or '.join(others)} there"
        )
    bitsandbytes()


def extra_losses(model: nn.Module) -> list[Callable[[], Tensor]]:
    """Return functions for the terms () that the active variants add to the loss of a step."""
    variants = active_variants(model).items()
    return [partial(variant.extra_loss, modules) for variant, modules in variants if variant.extra_loss]


def after_steps(model: nn.Module, steps: int) -> list[Callable[[int], None]]:
    """Return the active variants' hooks for after each of `steps` updates, called with the number of the step while the
    gradients are still there."""
    variants = active_variants(model).items()
    hooks = [(variant.after_step, modules) for variant, modules in variants if variant.after_step]
    return [lambda step, hook=hook, modules=modules: hook(modules, step, steps) for hook, modules in hooks]
