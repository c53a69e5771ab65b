"""A run as a Hugging Face folder, which transformers has loaded and computed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data.pretrained_tokenizer import FILE, TEMPLATE
from jobs.exporting.held_out import HeldOut
from jobs.exporting.hugging_face.tokens import samples_for, tokenizer_files
from jobs.exporting.hugging_face.translated import translated
from jobs.exporting.kinds import DENSE
from jobs.exporting.leaving import CARD, whole_card, without_paths
from jobs.exporting.opening import Opened
from jobs.exporting.options import MORE_LOSS
from jobs.exporting.verifying import Difference, draft_of
from jobs.runs.job import to_model_files
from lora.merge import MergedTensors
from models import files as model_files
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.storage.encoding import to_json
from runtime.storage.folders import Files, commit_folder

DTYPES = dict(zip(DENSE, (torch.float32, torch.float16, torch.bfloat16), strict=True))
LIMITS = {False: 1e-5, True: 2e-2}  # of the largest logit, by whether weights were rounded to 16 bits


def check_packages() -> None:
    """Raises UserError where what verifies the folder is not installed."""
    with needs_package("transformers", "export"):
        import transformers  # noqa: F401 - only whether it is there


def export_folder(
    opened: Opened, held_out: HeldOut, out: Path, kind: str | None = None, allowed: float = MORE_LOSS,
    place: str = "folder",
) -> list[str]:  # fmt: skip
    """Write the folder, and tell what was found. kind: of DTYPES, or None for those of the run's files. allowed: how
    much higher the loss may be. place: where its card says that it lies.

    Raises UserError where transformers computes something else, and UsageError where `out` exists."""
    files, tensors = whole_files(opened, place, DTYPES[kind] if kind else None)
    files = without_paths(files)
    with draft_of(out) as draft:
        commit_folder(draft, files)
        fix = "--outtype f32 writes all of what the run has learned" if tensors.rounded else ""
        theirs = _their_logits(draft)
        found = Difference.between("transformers", theirs(opened.probe), opened.expected, LIMITS[tensors.rounded], fix)
        told = [f"Verified on random tokens: {found}", held_out.compare("transformers", theirs, allowed)]
        if FILE not in files:
            kind = opened.base.tokenizer.kind
            told.append(f"Without a tokenizer: no tokenizer.json encodes as this one ({kind}) does")
        else:
            told.append(f"Its tokenizer encodes as the run's: {_same_tokens(draft, opened)} texts")
    return told


def whole_files(opened: Opened, place: str = "folder", dtype: torch.dtype | None = None) -> tuple[Files, MergedTensors]:
    """Config, weights, tokenizer, template and card; and what the weights are, each merged when it is written. dtype:
    theirs, or None for those of the run's files.

    Raises UserError for a model that is none of theirs."""
    model, tokenizer = opened.model, opened.base.tokenizer
    if opened.base.family:
        tensors = MergedTensors(model, dtype)
        files = to_model_files(model, tokenizer, opened.base, tensors)
    else:
        model, values = translated(model, tokenizer.eos_id)
        tensors = MergedTensors(model, dtype)
        files = model_files.to_files(model, {model_files.CONFIG: to_json(values)}, tensors)
        files |= tokenizer_files(tokenizer, model.config.max_positions)
    use = ["from transformers import AutoModelForCausalLM", ""]
    use += [f"model = AutoModelForCausalLM.from_pretrained({place!r})"]
    return files | describing_files(opened, "transformers", use), tensors


def describing_files(opened: Opened, library: str, use: Sequence[str]) -> Files:
    """The chat template, where there is one, and a card: what the folder is, for whoever finds it. use: the lines that
    load it."""
    files = {CARD: whole_card(opened.run, opened.base.sha256, library, use)}
    return files | ({TEMPLATE: opened.template.encode()} if isinstance(opened.template, str) else {})


def _their_logits(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What transformers computes of the folder in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # texts longer than the context are tokenized too
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return torch.no_grad()(lambda tokens: model(tokens).logits)


def _same_tokens(folder: Path, opened: Opened) -> int:
    """How many texts transformers' tokenizer was compared on. Raises UserError where it encodes one otherwise."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder, local_files_only=True), opened.base.tokenizer
    texts = samples_for(ours)
    for text in texts:
        if theirs(text)["input_ids"] != ours.encode(text):
            raise UserError(f"transformers' tokenizer encodes {text[:20]!r} otherwise; nothing was saved")
    return len(texts)
