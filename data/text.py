"""A text as tokens, and tokens as batches: each batch is a function of the seed and the step, with no state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.cache import cached
from data.tokenizers import Tokenizer
from runtime.batch import Batch
from runtime.errors import UserError
from runtime.storage import sha256

TOKENS = "tokens.bin"  # little-endian ids and nothing else

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

    return cached(data_dir / "tokens" / name, lambda: {TOKENS: tokenizer.encode(text).astype(stored).tobytes()}, parse)


def _require_length(tokens: np.ndarray, block_size: int) -> None:
    if len(tokens) < block_size + 1:
        raise UserError(
            f"the text has {len(tokens):,} tokens, and BLOCK_SIZE={block_size} needs at least {block_size + 1:,};"
            " lower BLOCK_SIZE or use a longer text"
        )


def _tensor(windows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(windows.astype(np.int64))


class TextBatches:
    """Random windows of a token stream, as (x, y) with y the token after each of x.

    `tokens` has shape (tokens,); `seed` is any integer from 0 to 2**63. Raises UserError for a text without a single
    window of block_size + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int) -> None:
        _require_length(tokens, block_size)
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.starts = len(tokens) - block_size  # windows may start at 0..starts-1
        self.offsets_T1 = np.arange(block_size + 1)

    def batch(self, step: int) -> Batch:
        """The batch of a step: x and y, int64 of shape (batch_size, block_size). The same for the same seed and step.

        A counter-based generator (Philox, Salmon et al. 2011) needs no history. The step counts in the counter's
        second word: in the first, where the generator itself counts, neighbouring steps would share their numbers.
        """
        random = np.random.Philox(key=self.seed, counter=step << 64).random_raw(self.batch_size)
        starts_B = (random % np.uint64(self.starts)).astype(np.int64)
        windows_BT1 = self.tokens[starts_B[:, None] + self.offsets_T1]
        return Batch(_tensor(windows_BT1[:, :-1]), _tensor(windows_BT1[:, 1:]))


def validation_windows(tokens: np.ndarray, block_size: int, batch_size: int, limit: int | None) -> list[Batch]:
    """Consecutive windows that predict each token but the first once, as batches (x, y), int64, (<= batch_size, T).

    A last window that is not full is left out. With `limit`, at most that many batches, whose windows are spread
    evenly over the text. Raises UserError for a text without a single window of block_size + 1 tokens.
    """
    _require_length(tokens, block_size)
    n = (len(tokens) - 1) // block_size
    kept = n if limit is None else min(n, limit * batch_size)
    rows = np.arange(kept) * n // max(kept, 1)
    x_NT = tokens[: n * block_size].reshape(n, block_size)[rows]
    y_NT = tokens[1 : n * block_size + 1].reshape(n, block_size)[rows]
    cuts = range(0, kept, batch_size)
    return [Batch(_tensor(x_NT[i : i + batch_size]), _tensor(y_NT[i : i + batch_size])) for i in cuts]
