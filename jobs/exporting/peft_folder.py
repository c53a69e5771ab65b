"""An adapter by itself, as a folder that PEFT reads, or one so plain that vLLM does too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import pad

from jobs.adapting.adapted import Adapted
from jobs.exporting.leaving import notes_of, without_paths
from jobs.exporting.opening import logits, random_tokens
from jobs.exporting.verifying import Difference, draft_of
from jobs.runs.base import Base
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.attach import REGEX, detach
from lora.combine import delta
from lora.config import LoRAConfig
from lora.variants.registry import VARIANTS
from models.files import dequantize
from models.pretrained.families import family_with
from runtime.errors import UserError
from runtime.storage.folders import Files, commit_folder

LIMIT = 1e-5  # of the largest logit
MERGED = "export base and adapter as one instead, with --to hf"


def export_folder(adapted: Adapted, out: Path, for_vllm: bool = False, place: str = "folder") -> str:
    """Write an adapter's folder, and tell what was found when it was read back. for_vllm: with one scale and rank.
    place: where its card says that it lies.

    Raises UsageError where `out` exists, UserError for an adapter that vLLM does not read.
    """
    files = _plain_files(adapted, place) if for_vllm else _files(adapted, place)
    with draft_of(out) as draft:
        commit_folder(draft, without_paths(files))
        return f"Verified on random tokens: {_read_back(adapted, draft)}"


def _files(adapted: Adapted, place: str) -> Files:
    """The run's own, with what is made of a seed here and might be other numbers elsewhere."""
    shared = adapted.adapter.make_shared(adapted.base.tensors)
    own = outward(adapted.adapter, adapted.base, notes_of(adapted.run), place, shared)
    return adapted.run.read() | own


def _plain_files(adapted: Adapted, place: str) -> Files:
    """The run's own, with the adapter folded."""
    was = adapted.adapter.config.variant
    note = {"folded": f"scales are in B, ranks filled up with zeros; it was {was}"}
    return adapted.run.read() | outward(_folded(adapted), adapted.base, notes_of(adapted.run) | note, place)


def outward(
    adapter: Adapter, base: Base, notes: Mapping[str, str], place: str, shared: nn.Module | None = None
) -> Files:
    """An adapter's files as they may leave this machine: of its base they have the name on the hub or that of its
    folder, and no path."""
    said = {name: text for name, text in adapter.metadata.items() if not Path(text).is_absolute()}
    return adapter_files.to_files(replace(adapter, metadata=said), notes, shared, base.family, place)


@torch.no_grad()
def _folded(adapted: Adapted) -> Adapter:
    """The same change as plain LoRA of one rank with a scale of 1. Raises UserError for what vLLM does not read."""
    adapter, base = adapted.adapter, adapted.base
    if not base.family:
        raise UserError(f"{base.run.name} is a model of this repository, which vLLM does not know; {MERGED}")
    if VARIANTS[adapter.config.variant].full_rank:
        kind = f"LORA_VARIANT={adapter.config.variant}"
        raise UserError(f"{kind} changes more than vLLM reads; train with LORA_VARIANT=lora, or {MERGED}")
    if copies := [f"{path}.{name}" for path, name, _ in adapter.trained_copies()]:
        instead = "train with LORA_TRAIN_EMBEDDINGS=False and LORA_BIAS=none"
        raise UserError(f"it has {', '.join(copies)} of its own, which vLLM does not read; {instead}, or {MERGED}")
    changes = {path: delta(adapter, path, base.tensors) for path in adapter.targets()}
    rank = max(len(change.A) for change in changes.values())
    tensors = {
        path: {"A": pad(c.A, (0, 0, 0, rank - len(c.A))).float(), "B": pad(c.B, (0, rank - len(c.A))).float()}
        for path, c in changes.items()
    }
    targets = adapter.targets() if adapter.config.targets.startswith(REGEX) else adapter.target_modules()
    config = LoRAConfig(rank, float(rank), adapter.config.dropout, ",".join(targets), train_embeddings=False)
    return replace(adapter, config=config, tensors=tensors)


def _read_back(adapted: Adapted, folder: Path) -> Difference:
    """How far logits with the folder's adapter are from those with the run's, both in fp32."""
    dequantize(adapted.base.model)
    model, found = adapted.base.model.float().eval(), []
    probe = random_tokens(model)
    for adapter in (adapter_files.load_adapter(folder, family_with), adapted.adapter):
        adapter.attach_to(model, base_sha256=adapted.base.sha256)
        found.append(logits(model, probe))
        detach(model, "default")
    return Difference.between("the folder read back", *found, LIMIT)
