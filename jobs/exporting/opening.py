"""A run opened to be exported: its model, its adapter by itself or merged, and what it must still compute elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.adapting.adapted import open_adapters
from jobs.runs.base import Base
from lora.adapter import Adapter
from lora.attach import detach
from lora.merge import merge
from models.files import dequantize
from models.pretrained.source import find_source
from models.transformer import Transformer
from runtime.errors import UsageError, UserError
from runtime.storage.runs import Run

ROWS, LENGTH = 2, 64  # of the random tokens on which two programs are compared


@dataclass(frozen=True)
class Opened:
    """A run as the model of its base, whose weights are as they are stored, and perhaps an adapter, attached to it or
    beside it. probe: random tokens (rows, length), and `expected` the logits there, in fp32, of the run as it was
    trained."""

    run: Run
    base: Base
    adapter: Adapter | None
    probe: Tensor
    expected: Tensor

    @property
    def model(self) -> Transformer:
        """The model."""
        return self.base.model

    @property
    def base_template(self) -> str | None:
        """How chats are written for its base."""
        own = getattr(self.base.tokenizer, "template", None)
        return self.base.run.metadata.get("template") or own

    @property
    def template(self) -> str | None:
        """How chats are written for it: as the run was trained, else as its base says."""
        return self.run.metadata.get("template") or self.base_template

    def make_dense(self) -> None:
        """Merge what is attached and take all weights to fp32, for those who need a model that is nothing else."""
        dequantize(self.model)
        merge(self.model.float())


def find_finished(root: Path, name: str) -> Run:
    """The run, folder or hub name. Raises UsageError where there is none, UserError for a run that has not finished."""
    run = find_source(root, name)
    if not run.finished:
        raise UserError(f"{run.name} has not finished training; start it again to go on with it")
    return run


def open_parts(root: Path, name: str) -> Opened:
    """A base, a fully fine-tuned run, or a LoRA run with its adapter beside its base, wherever its folder is.

    Raises UsageError where there is none, UserError for a run that has not finished and for what does not fit.
    """
    run = find_finished(root, name)
    adapter = None
    if run.kind == "lora":
        (adapted,) = open_adapters(root, (str(run.folder.absolute()),))
        base, adapter = adapted.base, adapted.adapter
    else:
        base = Base.of(run)
    model = base.model.eval().requires_grad_(False)
    probe = random_tokens(model)
    if adapter:
        adapter.attach_to(model, base_sha256=base.sha256)
    expected = logits(model, probe)
    if adapter:
        detach(model, "default")
    return Opened(run, base, adapter, probe, expected)


def open_adapter(root: Path, name: str, whole: str = "hf") -> Opened:
    """A LoRA run, its adapter beside its base. Raises as `open_parts` does, and UsageError for a run without one.
    whole: the format for those."""
    if (run := find_finished(root, name)).kind != "lora":
        raise UsageError(f"{run.name} has no adapter; --to {whole} exports the whole model")
    return open_parts(root, name)


def open_whole(root: Path, name: str) -> Opened:
    """As `open_parts` does, with the adapter attached: its weights are merged where they are written."""
    opened = open_parts(root, name)
    if opened.adapter:
        opened.adapter.attach_to(opened.model, base_sha256=opened.base.sha256)
    return opened


def random_tokens(model: Transformer) -> Tensor:
    """Tokens of all kinds to compare logits on, the same every time."""
    shape = (ROWS, min(LENGTH, model.config.max_positions))
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """The model's logits in fp32, (rows, length, vocabulary)."""
    return model(tokens)[0].float()
