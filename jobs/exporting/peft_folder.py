"""An adapter by itself, as a folder that PEFT reads, or one so plain that vLLM does too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch.nn.functional import pad

from jobs.exporting.low_rank import low_rank_changes
from jobs.exporting.opening import Opened, logits
from jobs.exporting.verifying import Difference, draft_of
from jobs.runs.job import to_adapter_files
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.attach import REGEX
from lora.config import LoRAConfig
from models.pretrained.families import family_with
from runtime.errors import UserError
from runtime.storage.folders import Files, commit_folder

LIMIT = 1e-5  # of the largest logit
MERGED = "export base and adapter as one instead, with --to hf"


def export_folder(opened: Opened, out: Path, for_vllm: bool = False) -> str:
    """Write an adapter's folder, and tell what was found when it was read back. for_vllm: with one scale and rank.

    Raises UsageError where `out` exists, UserError for an adapter that vLLM does not read.
    """
    files = _plain_files(opened) if for_vllm else _files(opened)
    with draft_of(out) as draft:
        commit_folder(draft, files)
        adapter_files.load_adapter(draft, family_with).attach_to(opened.model, base_sha256=opened.base.sha256)
        read_back = logits(opened.model, opened.probe)
        found = Difference.between("the folder read back", read_back, opened.expected, LIMIT)
        return f"Verified on random tokens: {found}"


def _files(opened: Opened) -> Files:
    """The run's own, with what is made of a seed here and might be other numbers elsewhere."""
    files, shared = opened.run.read(), opened.adapter.make_shared(opened.base.tensors)
    if shared is not None:
        whole = to_adapter_files(opened.adapter, opened.base, {}, shared)
        files |= {name: whole[name] for name in (adapter_files.CONFIG, adapter_files.TENSORS)}
    return files


def _plain_files(opened: Opened) -> Files:
    """The run's own, with the adapter folded."""
    note = {"folded": f"scales are in B, ranks filled up with zeros; it was {opened.adapter.config.variant}"}
    whole = to_adapter_files(_folded(opened), opened.base, note)
    names = (adapter_files.CONFIG, adapter_files.TENSORS, adapter_files.CARD)
    return opened.run.read() | {name: whole[name] for name in names}


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
