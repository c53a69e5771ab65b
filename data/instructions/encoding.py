"""Records as token ids, with what the model says in them marked: the same for training, evaluation and generation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cache import cached
from data.chat import END_TEXT, Piece, Template, encode_chat, encode_pieces, refuse_special
from data.instructions.records import Record
from data.tokenizers import Tokenizer
from runtime.console import say
from runtime.errors import UserError
from runtime.storage.content import sha256

FORM = 1  # to be raised when the same records come to have other tokens
EVERY = 5  # seconds between two lines of progress


@dataclass(frozen=True)
class Encoded:
    """A record's tokens. ids: (tokens,). said: (tokens,) bool, those of the answers, the tokens that end them too."""

    ids: np.ndarray
    said: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answers(self) -> int:
        """How many answers are said, one after the other."""
        return int(np.diff(self.said.astype(np.int8), prepend=0).clip(0).sum())

    def cut(self, longest: int) -> Encoded:
        """The first tokens, at most so many."""
        return Encoded(self.ids[:longest], self.said[:longest])


def encode_record(record: Record, template: Template, tokenizer: Tokenizer) -> Encoded:
    """A record as tokens. Raises UserError, which names the record, for what cannot be written or encoded."""
    try:
        if record.messages:
            refuse_special(tokenizer, record.messages)
            return Encoded(*encode_pieces(tokenizer, template.pieces(record.messages)))
        given = _before(record, tokenizer)
        ends = list(tokenizer.stop_ids[:1]) or tokenizer.encode_inside(END_TEXT)
        said = [*tokenizer.encode_inside(record.completion), *ends]
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
    return Encoded(np.array([*given, *said], tokenizer.dtype), np.arange(len(given) + len(said)) >= len(given))


def encode_prompt(record: Record, template: Template, tokenizer: Tokenizer) -> list[int]:
    """What a model is given of a record, at least one token: the tokens that it has before the last answer."""
    if record.messages:
        return encode_chat(tokenizer, record.messages[:-1], template)
    return _before(record, tokenizer) or tokenizer.encode("\n")


def _before(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The tokens before a text: of its prompt, which may be empty, with a BOS where the tokenizer has one."""
    return tokenizer.encode(record.prompt) if record.prompt or tokenizer.bos_id is not None else []


def written(record: Record, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    """A record as text, in the parts that are given and those that are said."""
    if record.messages:
        return template.pieces(record.messages)
    end = tokenizer.special_text("eos_token") if tokenizer.stop_ids else END_TEXT
    return [Piece(record.prompt, False), Piece(record.completion + (end or ""), True)]


def encode_all(
    records: Sequence[Record], template: Template, tokenizer: Tokenizer, data_dir: Path, digest: str
) -> list[Encoded]:
    """All records as tokens, kept in `data_dir`/tokens and checked when read. digest: of the records."""
    name = sha256(repr((FORM, digest, template, tokenizer.sha256)).encode())[:32]
    stored = np.dtype(tokenizer.dtype).newbyteorder("<")

    def build() -> dict[str, bytes]:
        found = list(_told(records, template, tokenizer))
        ids, said = (np.concatenate([getattr(each, part) for each in found]) for part in ("ids", "said"))
        lengths = np.array([len(each) for each in found], "<i8")
        return {"ids.bin": ids.astype(stored).tobytes(), "said.bin": said.tobytes(), "lengths.bin": lengths.tobytes()}

    def parse(files: dict[str, bytes]) -> list[Encoded]:
        ids, said = np.frombuffer(files["ids.bin"], stored), np.frombuffer(files["said.bin"], bool)
        lengths = np.frombuffer(files["lengths.bin"], "<i8")
        if len(lengths) != len(records) or not lengths.sum() == len(ids) == len(said):
            raise ValueError("they are other records")
        ends = np.cumsum(lengths)[:-1]
        return [Encoded(*parts) for parts in zip(np.split(ids, ends), np.split(said, ends), strict=True)]

    return cached(data_dir / "tokens" / name, build, parse)


def _told(records: Sequence[Record], template: Template, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Each record encoded, with a line now and then of how many have been."""
    told = time.monotonic()
    for i, record in enumerate(records):
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            say(f"Making tokens of {i:,} of {len(records):,} records, which is kept for the next time ...")
        yield encode_record(record, template, tokenizer)
