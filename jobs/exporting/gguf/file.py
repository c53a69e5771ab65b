"""A run as a GGUF file, which llama.cpp and Ollama read."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from jobs.exporting.gguf.content import BLOCK, GGUFTensors, count_equal, write
from jobs.exporting.gguf.layout import Layout
from jobs.exporting.gguf.llama_cpp import LlamaCpp, installed
from jobs.exporting.gguf.ollama import write_modelfile
from jobs.exporting.gguf.vocabulary import Vocabulary
from jobs.exporting.opening import Opened
from jobs.exporting.tokens import samples_for
from jobs.exporting.verifying import Difference, draft_of
from runtime.errors import UserError
from runtime.extras import needs_package

TYPES = ("f32", "f16", "bf16", "q8_0")
LIMITS = {"f32": 1e-4, "f16": 2e-2, "bf16": 2e-2}  # of the largest logit
MORE_LOSS = 0.05  # nats a token that fewer than 16 bits may cost on what the run itself would write


def check_packages() -> None:
    """Raises UserError where what writes the file is not installed."""
    with needs_package("gguf", "export"):
        import gguf  # noqa: F401 - only whether it is there


def export_file(opened: Opened, out: Path, kind: str, with_tokenizer: bool = True) -> list[str]:
    """Write the file and its Modelfile, and tell what was found. kind: of TYPES.

    Raises UserError for a model or a tokenizer that llama.cpp does not have, and where it computes something else.
    """
    layout = Layout.of(opened.model, opened.base.family)
    vocabulary = Vocabulary.of(opened.base.tokenizer, opened.model.config.vocab_size) if with_tokenizer else None
    tensors = GGUFTensors(layout, kind)
    with draft_of(out) as draft:
        write(draft, opened.run.name, opened.template, tensors, vocabulary)
        told = [f"Verified with the gguf package: {count_equal(draft, tensors)} tensors are as they were written"]
        told += _asked_of_llama_cpp(draft, opened, kind, vocabulary)
        if tensors.odd:
            told.append(f"In f16 instead, as q8_0 takes rows of {BLOCK} values: {', '.join(tensors.odd)}")
    if vocabulary:
        told.append(write_modelfile(out, opened, vocabulary))
    return told


def _asked_of_llama_cpp(path: Path, opened: Opened, kind: str, vocabulary: Vocabulary | None) -> list[str]:
    """What llama.cpp makes of it. Raises UserError where that is something else than the run does."""
    if not installed():
        return ["llama.cpp was not asked: pip install cyllama, and export again, to have it compared"]
    asked = LlamaCpp(path, opened.probe.shape[1])
    found = asked.logits(opened.probe)
    if limit := LIMITS.get(kind):
        told = [f"On random tokens, {Difference.between('llama.cpp', found, opened.expected, limit)}"]
    else:
        told = [_loss_told(found, opened.expected)]
    if vocabulary:
        texts = samples_for(opened.base.tokenizer)
        for text in texts:
            if asked.encode(text) != opened.base.tokenizer.encode(text):
                raise UserError(f"llama.cpp's tokens of {text[:20]!r} are others; nothing was saved")
        told.append(f"llama.cpp's tokens are the run's: {len(texts)} texts")
    return told


def _loss_told(found: Tensor, expected: Tensor) -> str:
    """How much more llama.cpp's loss is on what the run itself would write next. Raises UserError for too much."""
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    more = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    if not more <= MORE_LOSS:
        raise UserError(f"llama.cpp's loss is {more:.3f} nats a token higher, more than {MORE_LOSS}; nothing was saved")
    return f"llama.cpp's loss on what the run would write is {more:.1e} nats a token higher (up to {MORE_LOSS} passes)"
