"""How long records are and how they are written: by a base's own tokenizer and template, or estimated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.chat import GUIDE, Piece, Template
from data.instructions.encoding import encode_record, written
from data.instructions.records import Record
from data.linting.rules import answers, whole
from data.tokenizers import Tokenizer
from runtime.errors import UsageError
from runtime.extras import needs_package
from runtime.settings.config import Settings

CHARACTERS = 4  # of a token, about, in English
CONTEXT = 1024  # tokens, where no base says how many it takes
NO_TOKENIZER = Tokenizer("none", [])  # it has no special tokens, which a template might ask for


@dataclass(frozen=True)
class Measure:
    """Lengths in tokens. context: how many tokens there may be. base: whose tokenizer counts; empty for an estimate."""

    context: int
    base: str = ""
    tokenizer: Tokenizer | None = None
    template: Template | None = None

    @property
    def how(self) -> str:
        """How tokens are counted, in words."""
        if self.base:
            return f"tokens of {self.base}"
        return f"tokens estimated as characters / {CHARACTERS} (--base NAME counts them)"

    def tokens(self, record: Record) -> int:
        """The tokens of a record. Raises UserError where the base's template or tokenizer refuses it."""
        return self.lengths(record)[0]

    def lengths(self, record: Record) -> tuple[int, int]:
        """The tokens of a record, and how many of them are learned."""
        if self.tokenizer is None:
            learned = sum(map(len, answers(record)))
            return -(-len(whole(record)) // CHARACTERS), -(-learned // CHARACTERS)
        encoded = encode_record(record, self.template, self.tokenizer)
        return len(encoded), int(encoded.said.sum())

    def pieces(self, record: Record) -> list[Piece]:
        """A record as it is written for a model, in parts that are given and parts that are learned."""
        tokenizer = self.tokenizer or NO_TOKENIZER
        with needs_package("jinja2", "pretrained"):
            return written(record, self.template or Template.of(GUIDE, tokenizer), tokenizer)


def measure_by(settings: Settings, context: int | None) -> Measure:
    """The measure that a training run with these settings has. context: BLOCK_SIZE, where it was given.

    Raises UsageError where there is no such base, or the context is more than it takes.
    """
    if not settings.base and not settings.template:
        return Measure(context or CONTEXT)
    # Here, as this imports torch, and what needs no base comes without.
    from jobs.runs.base import tokenizer_in
    from jobs.runs.source import template_for
    from models.files import config_from
    from models.pretrained.source import Pretrained, find_source

    if not settings.base:
        return Measure(context or CONTEXT, template=template_for(settings, NO_TOKENIZER))
    run = find_source(Path(settings.checkpoints_dir), settings.base)
    if run.kind == "lora":
        raise UsageError(f"{run.name} is a LoRA run; name the base it was trained on: {run.metadata['base']['run']}")
    if not run.finished:
        raise UsageError(f"{run.name} has not finished training; start it again to go on with it")
    files, where = run.read(), str(run.artifact)
    tokenizer, longest = tokenizer_in(files, where), config_from(files, where).max_positions
    if context and context > longest:
        raise UsageError(f"BLOCK_SIZE={context}: the base {run.name} takes at most {longest} tokens; lower it to that")
    fitting = min(longest, settings.block_size) if isinstance(run, Pretrained) else longest
    return Measure(context or fitting, run.name, tokenizer, template_for(settings, tokenizer))
