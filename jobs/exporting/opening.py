"""A run opened to be exported: one dense model with its adapter merged, and what it must still compute elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.adapting.adapted import Adapted, open_adapters
from jobs.runs.base import Base
from lora.merge import merge
from models.files import dequantize
from models.pretrained.source import find_source
from models.transformer import Transformer
from runtime.errors import UserError
from runtime.storage.runs import Run

ROWS, LENGTH = 2, 64  # of the random tokens on which two programs are compared


@dataclass(frozen=True)
class Opened:
    """A run as one model. model: in fp32, with no adapter. dtypes: in which its weights are stored, by name. probe:
    random tokens (rows, length), and `expected` the logits there, in fp32, of the run as it was trained."""

    run: Run
    base: Base
    dtypes: Mapping[str, torch.dtype]
    probe: Tensor
    expected: Tensor

    @property
    def model(self) -> Transformer:
        """The model."""
        return self.base.model

    @property
    def template(self) -> str | None:
        """How chats are written for it: as the run was trained, else as its tokenizer's files say."""
        own = getattr(self.base.tokenizer, "template", None)
        return self.run.metadata.get("template") or self.base.run.metadata.get("template") or own

    def round_to(self, dtype: torch.dtype | None) -> bool:
        """Take the weights to a dtype, or None for those in which they are stored; whether any of them changed."""
        changed = False
        for name, p in self.model.named_parameters():
            values = p.data.to(dtype or self.dtypes[name])
            changed |= not torch.equal(values.float(), p.data)
            p.data = values
        return changed


def find_finished(root: Path, name: str) -> Run:
    """The run, folder or hub name. Raises UsageError where there is none, UserError for a run that has not finished."""
    run = find_source(root, name)
    if not run.finished:
        raise UserError(f"{run.name} has not finished training; start it again to go on with it")
    return run


def open_adapter(root: Path, run: Run) -> Adapted:
    """A LoRA run with its base, wherever its folder is."""
    (adapted,) = open_adapters(root, (str(run.folder.absolute()),))
    return adapted


def open_whole(root: Path, name: str) -> Opened:
    """A base, a fully fine-tuned run, or a LoRA run merged into its base, where matrices in 4 or 8 bits become dense.

    Raises UsageError where there is none, UserError for a run that has not finished and for what does not fit.
    """
    run = find_finished(root, name)
    adapted = open_adapter(root, run) if run.kind == "lora" else None
    base = adapted.base if adapted else Base.of(run)
    dequantize(base.model)
    dtypes = {name: p.dtype for name, p in base.model.named_parameters()}
    model = base.model.float().eval().requires_grad_(False)
    if adapted:
        adapted.adapter.attach_to(model, base_sha256=base.sha256)
    probe = random_tokens(model)
    expected = logits(model, probe)
    if adapted:
        merge(model)
    return Opened(run, base, dtypes, probe, expected)


def random_tokens(model: Transformer) -> Tensor:
    """Tokens of all kinds to compare logits on, the same every time."""
    shape = (ROWS, min(LENGTH, model.config.max_positions))
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """The model's logits in fp32, (rows, length, vocabulary)."""
    return model(tokens)[0].float()
