"""A trained run in Python, ready to generate text: `model, tokenizer = load("lora-folio-r8")`."""

from __future__ import annotations

from pathlib import Path

from data.tokenizers import Tokenizer
from jobs.generating.choice import choose
from lora.attach import activate
from models.transformer import Transformer
from runtime.device import existing_device


def load(name: str, checkpoints_dir: str | Path = "checkpoints", device: str = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a base, a fine-tuned run, or an adapter, which is then active on its base.

    name: of a run in `checkpoints_dir`, or its folder. device: as torch names it, or auto, which takes a GPU if there
    is one. Nothing of the model trains; `lora.attach.activate(model)` takes
    the adapter out of account. `model.generate_text(prompt)` continues a text.

    Raises UserError, in one line, for a run that is not there or is corrupted, and a device that is not there.
    """
    where, choice = existing_device(device), choose(Path(checkpoints_dir), name, None, ())
    model = choice.base.model.to(where).eval()
    activate(model, choice.on_model(None))
    model.tokenizer = choice.base.tokenizer
    return model.requires_grad_(False), choice.base.tokenizer
