"""A run as a GGUF file, which llama.cpp and Ollama read, and the Modelfile for the latter."""

from __future__ import annotations

from pathlib import Path

from jobs.exporting.gguf.content import BLOCK, GGUFTensors, count_equal, write
from jobs.exporting.gguf.llama_cpp import LlamaCpp, installed
from jobs.exporting.gguf.vocabulary import Vocabulary
from jobs.exporting.held_out import MORE_LOSS, HeldOut
from jobs.exporting.opening import Opened
from jobs.exporting.tokens import samples_for
from jobs.exporting.translated import translated
from jobs.exporting.verifying import Difference, draft_of
from models.pretrained.families import FAMILIES
from models.transformer import Transformer
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.storage.folders import write_file

TYPES = ("f32", "f16", "bf16", "q8_0")
LIMITS = {"f32": 1e-4, "f16": 2e-2, "bf16": 2e-2}  # of the largest logit


def check_packages() -> None:
    """Raises UserError where what writes the file is not installed."""
    with needs_package("gguf", "export"):
        import gguf  # noqa: F401 - only whether it is there


def modelfile_of(out: Path) -> Path:
    """Where the Modelfile of a GGUF file lies."""
    return out.with_suffix(".Modelfile")


def export_file(
    opened: Opened, held_out: HeldOut, out: Path, kind: str, with_tokenizer: bool = True, allowed: float = MORE_LOSS
) -> list[str]:
    """Write the file and its Modelfile, and tell what was found. kind: of TYPES. allowed: how much higher the loss may
    be.

    Raises UserError for a model or a tokenizer that llama.cpp does not have, and where it computes something else.
    """
    model, arch = _llama_shaped(opened)
    vocabulary = Vocabulary.of(opened.base.tokenizer, model.config.vocab_size) if with_tokenizer else None
    tensors = GGUFTensors(model, arch, kind)
    with draft_of(out) as draft:
        write(draft, opened.run.name, opened.template, tensors, vocabulary)
        told = [f"Verified with the gguf package: {count_equal(draft, tensors)} tensors are as they were written"]
        told += _asked_of_llama_cpp(draft, opened, held_out, kind, vocabulary, allowed)
        if tensors.odd:
            told.append(f"In f16 instead, as q8_0 takes rows of {BLOCK} values: {', '.join(tensors.odd)}")
    if vocabulary:
        write_file(modelfile_of(out), _modelfile(out, opened, vocabulary))
    return told


def _llama_shaped(opened: Opened) -> tuple[Transformer, str]:
    """The model, and what llama.cpp calls its kind. Raises UserError where it has none."""
    if opened.model.config.norm != "rms":
        raise UserError(
            "llama.cpp computes GELU from a table in half precision, so GPT-2 and ARCHITECTURE=gpt are not exported to "
            "it; use --to hf, or train a base with ARCHITECTURE=llama TOKENIZER=bpe"
        )
    if not opened.base.family:
        model, _ = translated(opened.model, None)
        return model, "llama"
    kind = next(name for name, family in FAMILIES.items() if family is opened.base.family)
    if kind == "qwen3" and opened.model.config.has_bias("qkv"):
        raise UserError("llama.cpp's qwen3 has no biases in attention, so this model is not exported to it")
    return opened.model, "llama" if kind == "mistral" else kind


def _asked_of_llama_cpp(
    path: Path, opened: Opened, held_out: HeldOut, kind: str, vocabulary: Vocabulary | None, allowed: float
) -> list[str]:
    """What llama.cpp makes of it. Raises UserError where that is something else than the run does."""
    if not installed():
        return ["llama.cpp was not asked: pip install cyllama, and export again, to have it compared"]
    asked, told = LlamaCpp(path, max(opened.probe.shape[1], held_out.longest)), []
    if limit := LIMITS.get(kind):
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


def _modelfile(out: Path, opened: Opened, vocabulary: Vocabulary) -> bytes:
    """What `ollama create` reads. A chat template is in the GGUF file; without one a prompt is passed on as it is."""
    lines = [f"FROM ./{out.name}", f"PARAMETER num_ctx {opened.model.config.max_positions}"]
    if opened.template is None:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    lines += [f'PARAMETER stop "{vocabulary.tokens[i]}"' for i in opened.base.tokenizer.stop_ids]
    return ("\n".join(lines) + "\n").encode()
