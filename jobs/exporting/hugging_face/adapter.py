"""An adapter by itself, as a folder that PEFT reads, or one so plain that vLLM does too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.nn.functional import pad

from jobs.exporting.leaving import notes_of, without_paths
from jobs.exporting.low_rank import low_rank_changes
from jobs.exporting.opening import Opened, logits
from jobs.exporting.verifying import Difference, draft_of
from jobs.runs.base import Base
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.attach import REGEX
from lora.config import LoRAConfig
from models.pretrained.families import family_with
from runtime.errors import UserError
from runtime.storage.folders import Files, commit_folder

LIMIT = 1e-5  # of the largest logit
MERGED = "export base and adapter as one instead, with --to hf"


def export_folder(opened: Opened, out: Path, for_vllm: bool = False, place: str = "folder") -> str:
    """Write an adapter's folder, and tell what was found when it was read back. for_vllm: with one scale and rank.
    place: where its card says that it lies.

    Raises UsageError where `out` exists, UserError for an adapter that vLLM does not read.
    """
    files = _plain_files(opened, place) if for_vllm else _files(opened, place)
    with draft_of(out) as draft:
        commit_folder(draft, without_paths(files))
        adapter_files.load_adapter(draft, family_with).attach_to(opened.model, base_sha256=opened.base.sha256)
        read_back = logits(opened.model, opened.probe)
        found = Difference.between("the folder read back", read_back, opened.expected, LIMIT)
        return f"Verified on random tokens: {found}"


def _files(opened: Opened, place: str) -> Files:
    """The run's own, with what is made of a seed here and might be other numbers elsewhere."""
    shared = opened.adapter.make_shared(opened.base.tensors)
    return opened.run.read() | outward(opened.adapter, opened.base, notes_of(opened.run), place, shared)


def _plain_files(opened: Opened, place: str) -> Files:
    """The run's own, with the adapter folded."""
    note = {"folded": f"scales are in B, ranks filled up with zeros; it was {opened.adapter.config.variant}"}
    return opened.run.read() | outward(_folded(opened), opened.base, notes_of(opened.run) | note, place)


def outward(
    adapter: Adapter, base: Base, notes: Mapping[str, str], place: str, shared: nn.Module | None = None
) -> Files:
    """An adapter's files as they may leave this machine: of its base they have the name on the hub or that of its
    folder, and no path."""
    said = {name: text for name, text in adapter.metadata.items() if not Path(text).is_absolute()}
    return adapter_files.to_files(replace(adapter, metadata=said), notes, shared, base.family, place)


def _folded(opened: Opened) -> Adapter:
    """The same change as plain LoRA of one rank with a scale of 1. Raises UserError for what vLLM does not read."""
    adapter = opened.adapter
    if not opened.base.family:
        raise UserError(f"{opened.base.run.name} is a model of this repository, which vLLM does not know; {MERGED}")
    changes = low_rank_changes(opened, "vLLM", MERGED)
    rank = max(len(change.A) for change in changes.values())
    tensors = {
        path: {"A": pad(c.A, (0, 0, 0, rank - len(c.A))).float(), "B": pad(c.B, (0, rank - len(c.A))).float()}
        for path, c in changes.items()
    }
    targets = adapter.targets() if adapter.config.targets.startswith(REGEX) else adapter.target_modules()
    config = LoRAConfig(rank, float(rank), adapter.config.dropout, ",".join(targets), train_embeddings=False)
    return replace(adapter, config=config, tensors=tensors)
