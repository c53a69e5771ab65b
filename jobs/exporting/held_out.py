"""What the loss of an export is measured on: text or records that its run held out, or a text that is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from data.chat import Template
from data.corpora import CORPORA, load_corpus
from data.text import tokens_of, validation_windows
from jobs.adapting.adapted import texts_of
from jobs.exporting.opening import Opened, logits
from jobs.judging.losses import ROOM
from jobs.runs.source import as_data, load_source
from runtime.errors import UserError
from runtime.progress import Patience
from runtime.settings.config import EARLIER, Settings
from runtime.training.batch import IGNORED, Batch

LENGTH, ROWS = 256, 8  # tokens in a window at most, and windows or records in a batch
TOKENS = 2048  # that are measured on, about, where there are so many


@dataclass(frozen=True)
class HeldOut:
    """Some rows to measure a loss on. what: these in words. parts: tokens (B, T), and as targets what follows each,
    (B, T) with IGNORED where that does not count, or its probabilities (B, T, V). ours: the loss of the run itself, in
    nats a token that counts."""

    what: str
    parts: list[tuple[Tensor, Tensor]]
    ours: float

    @property
    def longest(self) -> int:
        """How many tokens the longest row has."""
        return max(tokens.shape[1] for tokens, _ in self.parts)

    def compare(self, reader: str, logits: Callable[[Tensor], Tensor], allowed: float) -> str:
        """Tell the losses of the run and of a reader's logits, (B, T) -> (B, T, V) in fp32.

        Raises UserError where the reader's is more than `allowed` nats a token higher, or no number.
        """
        theirs = _loss(self.parts, logits, reader)
        if not (more := theirs - self.ours) <= allowed:
            raise UserError(
                f"on {self.what}, the loss of {reader} is {theirs:.4f} nats a token, {more:.4f} more than the run's, "
                f"and up to {allowed:g} more passes; nothing was saved; --allow-loss lets more pass"
            )
        return f"Loss on {self.what}: {self.ours:.4f} nats a token, and {theirs:.4f} in {reader}"


def held_out_of(opened: Opened, data_dir: Path, named: str = "") -> HeldOut:
    """The text that is named, a corpus or a file, else what the run held out; where that is not there any more, random
    tokens with what the run would write after each. It measures the loss of the run too, which must not be rounded yet.

    Raises UserError for a named text that cannot be used.
    """
    try:
        what, batches = _windows(opened, data_dir, named) if named else _own(opened, data_dir)
        parts = [(part.tokens, part.targets) for batch in batches for part in _cut(batch, opened)]
    except UserError as error:
        if named:
            raise
        why = f"no held-out text: {error}; --text FILE measures it on one"
        what = f"what the run itself would write after random tokens ({why})"
        parts = [(opened.probe, opened.expected.softmax(-1))]
    return HeldOut(what, parts, _loss(parts, lambda tokens: logits(opened.model, tokens), "the run"))


def _own(opened: Opened, data_dir: Path) -> tuple[str, list[Batch]]:
    """What the run held out, as it was trained. Raises UserError where that is not known, not there, or has changed."""
    run, tokenizer = opened.run, opened.base.tokenizer
    if not texts_of(run):
        raise UserError(f"{run.name} does not tell what it was trained on")
    length = min(run.metadata.get("window", LENGTH), opened.model.config.max_positions, LENGTH)
    sizes = {"data_dir": str(data_dir), "block_size": length, "eval_batch_size": ROWS, "template": ""}
    settings = Settings.from_dict(EARLIER | run.metadata["settings"] | {"dataset": texts_of(run)[0]} | sizes)
    template = run.metadata.get("template")
    data = as_data(load_source(settings), tokenizer, settings, template and Template.of(template, tokenizer))
    if data.sha256 != run.metadata.get("dataset", {}).get("sha256", data.sha256):
        raise UserError(f"{settings.dataset} is not what it was when {run.name} was trained")
    return f"what {run.name} held out of {data.name}", data.validation(_batches(length))


def _windows(opened: Opened, data_dir: Path, name: str) -> tuple[str, list[Batch]]:
    """What is held out of a corpus, or the whole text of a file."""
    corpus = load_corpus(name, data_dir)
    what, text = (f"held-out text of {name}", corpus.validation) if name in CORPORA else (name, corpus.text)
    tokens = tokens_of(text, opened.base.tokenizer, data_dir)
    length = min(opened.model.config.max_positions, LENGTH, len(tokens) - 1)
    if length < 1:
        raise UserError(f"{name} has {len(tokens)} tokens, and nothing can be measured on it")
    return what, validation_windows(tokens, length, ROWS, _batches(length))


def _batches(length: int) -> int:
    return max(1, TOKENS // (ROWS * length))


def _cut(batch: Batch, opened: Opened) -> list[Batch]:
    """A batch in parts whose logits take no more memory than `ROOM`, each with whole rows."""
    rows = max(1, ROOM // (batch.tokens.shape[1] * opened.model.config.vocab_size))
    return batch.cut(-(-len(batch.tokens) // rows))


def _loss(parts: list[tuple[Tensor, Tensor]], logits: Callable[[Tensor], Tensor], whose: str) -> float:
    """The mean cross-entropy of what counts."""
    total, counted, tell = 0.0, 0, Patience(f"the loss of {whose}", "batch")
    for done, (tokens, targets) in enumerate(parts, 1):
        found = logits(tokens).transpose(1, 2)
        chances = targets.dim() == 3
        wanted = targets.transpose(1, 2) if chances else targets
        total += F.cross_entropy(found, wanted, ignore_index=IGNORED, reduction="sum").double().item()
        counted += tokens.numel() if chances else int((targets != IGNORED).sum())
        tell(done, len(parts))
    return total / counted
