"""A run as a GGUF file, which llama.cpp and Ollama read."""

from __future__ import annotations

from pathlib import Path

from jobs.exporting.gguf.content import BLOCK, GGUFTensors, count_equal, write
from jobs.exporting.gguf.layout import Layout
from jobs.exporting.gguf.llama_cpp import LlamaCpp, installed, quantize_file
from jobs.exporting.gguf.ollama import write_modelfile
from jobs.exporting.gguf.vocabulary import Vocabulary
from jobs.exporting.held_out import HeldOut
from jobs.exporting.hugging_face.tokens import samples_for
from jobs.exporting.kinds import BY_LLAMA_CPP
from jobs.exporting.opening import Opened
from jobs.exporting.options import MORE_LOSS
from jobs.exporting.verifying import Difference, draft_of
from runtime.errors import UserError
from runtime.extras import needs_package

IN_16_BITS = 2e-2  # of the largest logit


def check_packages(kind: str = "f32") -> None:
    """Raises UserError where what writes a file of this kind is not installed."""
    if kind in BY_LLAMA_CPP and not installed():
        raise UserError(
            f"--outtype {kind} is made by llama.cpp itself: pip install cyllama; q4_1 and q8_0 need no more"
        )
    with needs_package("gguf", "export"):
        import gguf  # noqa: F401 - only whether it is there


def export_file(
    opened: Opened, held_out: HeldOut, out: Path, kind: str, with_tokenizer: bool = True, allowed: float = MORE_LOSS
) -> list[str]:
    """Write the file and its Modelfile, and tell what was found. kind: as --outtype names it. allowed: how much higher
    the loss may be.

    Raises UserError for a model or a tokenizer that llama.cpp does not have, and where it computes something else.
    """
    layout = Layout.of(opened.model, opened.base.family)
    vocabulary = Vocabulary.of(opened.base.tokenizer, opened.model.config.vocab_size) if with_tokenizer else None
    tensors = GGUFTensors(layout, "f32" if kind in BY_LLAMA_CPP else kind)
    with draft_of(out) as draft:
        write(draft, opened.run.name, opened.template, tensors, vocabulary)
        told = [f"Verified with the gguf package: {count_equal(draft, tensors)} tensors are as they were written"]
        if kind in BY_LLAMA_CPP:
            quantize_file(draft, kind)
            told.append(f"llama.cpp has taken them to {kind}")
        limit = {"f32": layout.limit, "f16": IN_16_BITS, "bf16": IN_16_BITS}.get(kind)
        told += _asked_of_llama_cpp(draft, opened, held_out, limit, vocabulary, allowed) + layout.notes
        if tensors.odd:
            told.append(f"In f16 instead, as {kind} takes rows of {BLOCK} values: {', '.join(tensors.odd)}")
    if vocabulary:
        write_modelfile(out, opened, vocabulary)
    return told


def _asked_of_llama_cpp(
    path: Path, opened: Opened, held_out: HeldOut, limit: float | None, vocabulary: Vocabulary | None, allowed: float
) -> list[str]:
    """What llama.cpp makes of it. limit: of the difference of logits, or None where the loss decides alone.

    Raises UserError where that is something else than the run does.
    """
    if not installed():
        return ["llama.cpp was not asked: pip install cyllama, and export again, to have it compared"]
    asked, told = LlamaCpp(path, max(opened.probe.shape[1], held_out.longest)), []
    if limit:
        found = Difference.between("llama.cpp", asked.logits(opened.probe), opened.expected, limit)
        told.append(f"On random tokens, {found}")
    told.append(held_out.compare("llama.cpp", asked.logits, allowed))
    if vocabulary:
        texts = samples_for(opened.base.tokenizer)
        for text in texts:
            if asked.encode(text) != opened.base.tokenizer.encode(text):
                raise UserError(f"llama.cpp's tokens of {text[:20]!r} are others; nothing was saved")
        told.append(f"llama.cpp's tokens are the run's: {len(texts)} texts")
    return told
