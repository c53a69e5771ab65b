"""Text as token ids, and token ids as batches: each batch is a function of seed and step, without state."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.cache import cached
from data.corpora import Corpus
from data.tokenizers import Tokenizer
from runtime.console import say
from runtime.errors import UserError
from runtime.storage.content import sha256
from runtime.training.batch import Batch

TOKENS = "tokens.bin"  # little-endian ids and nothing else
SLOW = 2**20  # characters that take a tokenizer of word pieces seconds

# Shapes: B sequences in a batch, T tokens in a sequence (BLOCK_SIZE), N windows in a text.


def tokens_of(text: str, tokenizer: Tokenizer, data_dir: Path) -> np.ndarray:
    """Token ids of a text, shape (tokens,), of the tokenizer's type; kept in `data_dir`/tokens and checked when read.

    Raises UserError where the tokenizer does not know a character of the text.
    """
    name = f"{sha256(text.encode('utf-8', 'surrogatepass'))[:16]}-{tokenizer.sha256[:16]}"
    stored = np.dtype(tokenizer.dtype).newbyteorder("<")

    def parse(files: dict[str, bytes]) -> np.ndarray:
        tokens = np.frombuffer(files[TOKENS], stored)
        if not len(tokens) or tokens.max() >= tokenizer.vocab_size:
            raise ValueError("there are no such tokens")
        return tokens.astype(tokenizer.dtype, copy=False)

    def build() -> dict[str, bytes]:
        if tokenizer.kind != "char" and len(text) > SLOW:
            say(f"Making tokens of {len(text):,} characters, which is kept for the next time ...")
        return {TOKENS: tokenizer.encode_array(text).astype(stored).tobytes()}

    return cached(data_dir / "tokens" / name, build, parse)


def _tensor(windows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(windows.astype(np.int64))


def validation_windows(tokens: np.ndarray, block_size: int, batch_size: int, limit: int | None) -> list[Batch]:
    """Consecutive windows that predict each token but the first once, as batches (x, y), int64, (<= batch_size, T).

    A last window that is not full is left out. With `limit`, at most that many batches, whose windows are spread
    evenly over the text.
    """
    n = (len(tokens) - 1) // block_size
    kept = n if limit is None else min(n, limit * batch_size)
    rows = np.arange(kept) * n // max(kept, 1)
    x_NT = tokens[: n * block_size].reshape(n, block_size)[rows]
    y_NT = tokens[1 : n * block_size + 1].reshape(n, block_size)[rows]
    cuts = range(0, kept, batch_size)
    return [Batch(_tensor(x_NT[i : i + batch_size]), _tensor(y_NT[i : i + batch_size])) for i in cuts]


@dataclass(frozen=True)
class TextData:
    """A corpus as windows of tokens, each with the token after it as target: a `data.dataset.Dataset`.

    train, held_out: token ids of its two splits, (tokens,). block_size: tokens in a window. batch_size: windows in a
    batch of evaluation. step_size: windows in a step. seed: any integer from 0 to 2**63.

    Raises UserError where a split is too short for a single window of block_size + 1 tokens.
    """

    corpus: Corpus
    train: np.ndarray = field(repr=False)
    held_out: np.ndarray = field(repr=False)
    block_size: int
    batch_size: int
    step_size: int
    seed: int

    def __post_init__(self) -> None:
        part, tokens = min(("training", self.train), ("held-out", self.held_out), key=lambda item: len(item[1]))
        if len(tokens) > self.block_size:
            return
        longer = (self.block_size + 1) / max(1, len(tokens))
        fix = f"set --block-size {len(tokens) - 1}, or use" if len(tokens) > 1 else "use"
        raise UserError(
            f"the {part} part of {self.name} has {len(tokens):,} tokens, and BLOCK_SIZE={self.block_size} needs "
            f"{self.block_size + 1:,}; {fix} a text at least {longer:.3g} times as long"
        )

    @classmethod
    def load(cls, corpus: Corpus, tokenizer: Tokenizer, data_dir: Path, *sizes: int) -> TextData:
        """The corpus in the tokenizer's tokens, from `data_dir` where they are kept; sizes: block_size to seed."""
        return cls(
            corpus, *(tokens_of(text, tokenizer, data_dir) for text in (corpus.train, corpus.validation)), *sizes
        )

    @property
    def name(self) -> str:
        """The corpus's name."""
        return self.corpus.name

    @property
    def sha256(self) -> str:
        """The corpus's digest."""
        return self.corpus.sha256

    @property
    def steps_in_epoch(self) -> float:
        """Windows are drawn at random, so this is how many steps have as many tokens as the text."""
        return len(self.train) / self.tokens_in_step

    @property
    def tokens_in_step(self) -> int:
        """All windows are full."""
        return self.step_size * self.block_size

    def batch(self, step: int) -> Batch:
        """Random windows of the training text, int64 (step_size, block_size). The same for the same seed and step.

        A counter-based generator (Philox, Salmon et al. 2011) needs no history. The step counts in the counter's
        second word: in the first, where the generator itself counts, neighbouring steps would share their numbers.
        """
        random = np.random.Philox(key=self.seed, counter=step << 64).random_raw(self.step_size)
        starts_B = (random % np.uint64(len(self.train) - self.block_size)).astype(np.int64)
        windows_BT1 = self.train[starts_B[:, None] + np.arange(self.block_size + 1)]
        return Batch(_tensor(windows_BT1[:, :-1]), _tensor(windows_BT1[:, 1:]))

    def validation(self, limit: int | None) -> list[Batch]:
        """The held-out text as batches, at most `limit` of them."""
        return validation_windows(self.held_out, self.block_size, self.batch_size, limit)
