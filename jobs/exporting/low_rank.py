"""What an adapter changes as one product of two matrices a linear, for readers that know nothing else."""

from __future__ import annotations

from jobs.exporting.opening import Opened
from lora.combine import Delta, delta
from lora.variants.registry import VARIANTS
from runtime.errors import UserError


def low_rank_changes(opened: Opened, reader: str, instead: str) -> dict[str, Delta]:
    """Each target's change, with its scale in B, in fp64.

    Raises UserError for an adapter that changes more than that. instead: what to do then, after a semicolon.
    """
    adapter = opened.adapter
    if VARIANTS[adapter.config.variant].full_rank:
        kind = f"LORA_VARIANT={adapter.config.variant}"
        raise UserError(f"{kind} changes more than {reader} reads; train with LORA_VARIANT=lora, or {instead}")
    if copies := [f"{path}.{name}" for path, name, _ in adapter.trained_copies()]:
        fix = "train with LORA_TRAIN_EMBEDDINGS=False and LORA_BIAS=none"
        raise UserError(f"it has {', '.join(copies)} of its own, which {reader} does not read; {fix}, or {instead}")
    return {path: delta(adapter, path, opened.base.tensors) for path in adapter.targets()}
