"""A run as a Hugging Face folder, which transformers has loaded and computed with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from data.pretrained_tokenizer import FILE, TEMPLATE
from jobs.exporting.held_out import MORE_LOSS, HeldOut
from jobs.exporting.opening import Opened
from jobs.exporting.tokens import samples_for, tokenizer_files
from jobs.exporting.translated import translated
from jobs.exporting.verifying import Difference, draft_of
from jobs.runs.job import to_model_files
from models import files as model_files
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.storage.encoding import to_json
from runtime.storage.folders import Files, commit_folder

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LIMITS = {False: 1e-5, True: 2e-2}  # of the largest logit, by whether weights were rounded to 16 bits
CARD = "README.md"


def check_packages() -> None:
    """Raises UserError where what verifies the folder is not installed."""
    with needs_package("transformers", "export"):
        import transformers  # noqa: F401 - only whether it is there


def export_folder(
    opened: Opened, held_out: HeldOut, out: Path, kind: str | None = None, allowed: float = MORE_LOSS
) -> list[str]:
    """Write the folder, and tell what was found. kind: of DTYPES, or None for those of the run's files. allowed: how
    much higher the loss may be.

    Raises UserError where transformers computes something else, and UsageError where `out` exists."""
    rounded = opened.round_to(DTYPES[kind] if kind else None)
    files = whole_files(opened)
    with draft_of(out) as draft:
        commit_folder(draft, files)
        fix = "--outtype f32 writes all of what the run has learned" if rounded else ""
        theirs = _their_logits(draft)
        found = Difference.between("transformers", theirs(opened.probe), opened.expected, LIMITS[rounded], fix)
        told = [f"Verified on random tokens: {found}", held_out.compare("transformers", theirs, allowed)]
        if FILE not in files:
            kind = opened.base.tokenizer.kind
            told.append(f"Without a tokenizer: no tokenizer.json encodes as this one ({kind}) does")
        else:
            told.append(f"Its tokenizer encodes as the run's: {_same_tokens(draft, opened)} texts")
    return told


def whole_files(opened: Opened) -> Files:
    """Config, weights, tokenizer, template and card."""
    if opened.base.family:
        files = to_model_files(opened.model, opened.base.tokenizer, opened.base)
    else:
        tokenizer = opened.base.tokenizer
        model, values = translated(opened.model, tokenizer.eos_id)
        files = model_files.to_files(model, {model_files.CONFIG: to_json(values)})
        files |= tokenizer_files(tokenizer, model.config.max_positions)
    if isinstance(opened.template, str):
        files[TEMPLATE] = opened.template.encode()
    return files | {CARD: _card(opened)}


def _card(opened: Opened) -> bytes:
    """What the folder is, for whoever finds it."""
    run, base = opened.run, opened.base.run
    said = run.metadata.get("texts", [run.metadata["settings"].get("dataset")])
    rows = {"run": run.name, "kind": run.kind, "base": base.name if base.name != run.name else ""}
    rows |= {"trained on": ", ".join(filter(None, said)), "fingerprint of its base": opened.base.sha256}
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {run.name}", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items() if text)]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


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
