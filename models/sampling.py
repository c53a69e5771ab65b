"""Sampling text: the key-value cache, and the loop that streams tokens.

The model sees at most block_size positions. Past that the window moves on by half a block, re-reading its newer
half from position 0: `window_start` says where the window of the n-th token begins, for every prompt and row alike.
A token is therefore what a pass without a cache over that same window gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lora.merge import cached_weights
from models.choosing import Sampling, choose

if TYPE_CHECKING:
    from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

NARROW = 256  # see `_products`


def window_start(n: int, block_size: int) -> int:
    """Where the window begins that the token after the first n is predicted from; it is at most block_size long."""
    half = max(1, block_size // 2)
    return math.ceil(max(0, n - block_size) / half) * half


class LayerCache:
    """Keys and values of one layer, (2, B, H, block_size, D); of each row the first `lengths` positions are filled.

    On the CPU they are kept in fp32: with one query a row, torch's kernel takes 2 to 4 times as long in bf16.
    """

    kv_2BHSD: Tensor | None = None

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def store(self, kv_2BHTD: Tensor) -> bool:
        """Keep new keys and values; True where they are whole windows, which attend to nothing else."""
        _, B, H, T, D = kv_2BHTD.shape
        if self.kv_2BHSD is None:
            dtype = torch.float32 if kv_2BHTD.device.type == "cpu" else kv_2BHTD.dtype
            self.kv_2BHSD = kv_2BHTD.new_zeros(2, B, H, self.cache.block_size, D, dtype=dtype)
        if self.cache.whole:
            self.kv_2BHSD[:, :, :, :T] = kv_2BHTD
        elif self.cache.position is not None:
            self.kv_2BHSD[:, :, :, self.cache.position] = kv_2BHTD[:, :, :, 0]
        else:
            rows, at = torch.arange(B, device=kv_2BHTD.device), self.cache.positions_B1[:, 0]
            self.kv_2BHSD[:, rows, :, at] = kv_2BHTD[:, :, :, 0].transpose(0, 1).to(self.kv_2BHSD.dtype)
        return self.cache.whole

    def attend(self, q_BH1D: Tensor) -> Tensor:
        """One new query a row, over all that the row holds, its own position included: (B, H, 1, D)."""
        k, v = self.kv_2BHSD[:, :, :, : self.cache.width]
        with self.cache.no_casts:  # autocast would cast all keys and values anew for every token
            y = F.scaled_dot_product_attention(q_BH1D.to(k.dtype), k, v, attn_mask=self.cache.seen_B11S)
        return y.to(q_BH1D.dtype)

    def take(self, rows: list[int], other: LayerCache) -> None:
        """Replace some rows by those of another cache."""
        self.kv_2BHSD[:, rows] = other.kv_2BHSD


class KVCache:
    """What each row of a batch has been read, and the pass through the model that is under way.

    Whole windows are read right-padded: under a causal mask nothing real attends to the padding, and its keys are
    overwritten or hidden afterwards. Then every row takes one token at a time, each at its own position.
    """

    whole: bool  # the pass reads whole windows from position 0, else one token a row
    lengths: list[int]  # of each row, what this pass adds included
    position: int | None  # one token a row: where it stands, if that is the same for all
    positions_B1: Tensor
    seen_B11S: Tensor | None  # what each row holds, where that is not the same for all

    def __init__(self, model: BigramLanguageModelLoRA) -> None:
        self.model, self.block_size = model, model.config.max_positions
        self.device = model.token_embedding.weight.device
        self.no_casts = torch.autocast(self.device.type, enabled=False)
        self.layers = [LayerCache(self) for _ in model.blocks]

    @property
    def width(self) -> int:
        """How many positions the longest row holds."""
        return max(self.lengths)

    def read(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Read one window a row, from position 0; logits (B, V) for the token after each."""
        self.whole, self.lengths = True, [len(window) for window in windows]
        idx_BT = torch.tensor([[*window, *[0] * (self.width - len(window))] for window in windows], device=self.device)
        return self.model(idx_BT, cache=self)[0][:, 0]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token a row; logits (B, V) for the one after. A full row must be read anew afterwards."""
        at = [min(length, self.block_size - 1) for length in self.lengths]
        self.whole, self.lengths = False, [position + 1 for position in at]
        self.position = at[0] if len(set(at)) == 1 else None
        self.positions_B1 = torch.tensor(at, device=self.device)[:, None]
        self.seen_B11S = None
        if self.position is None:
            columns_S = torch.arange(self.width, device=self.device)
            self.seen_B11S = (columns_S <= self.positions_B1)[:, None, None]
        return self.model(torch.tensor(tokens, device=self.device)[:, None], cache=self)[0][:, 0]

    def reread(self, rows: list[int], windows: Sequence[Sequence[int]]) -> Tensor:
        """Start some rows again with these windows; logits (len(rows), V)."""
        fresh = KVCache(self.model)
        logits = fresh.read(windows)
        for layer, other in zip(self.layers, fresh.layers, strict=True):
            layer.take(rows, other)
        for row, length in zip(rows, fresh.lengths, strict=True):
            self.lengths[row] = length
        return logits

    def positions(self, T: int) -> Tensor:
        """The positions of the pass under way, for the position embedding: (T,) or (B, 1)."""
        return torch.arange(T, device=self.device) if self.whole else self.positions_B1

    def last(self, x_BTC: Tensor) -> Tensor:
        """Of each row, the last real position: (B, 1, C)."""
        if not self.whole:
            return x_BTC
        return x_BTC[
            torch.arange(len(x_BTC), device=self.device), torch.tensor(self.lengths, device=self.device) - 1, None
        ]


def _products(model: BigramLanguageModelLoRA) -> AbstractContextManager:
    """The dtype of products while generating: the caller's, but fp32 for narrow models on the CPU.

    With a row or a few, a product in bf16 takes 15 microseconds before it starts: at 128 wide, 4 layers, a token's
    products took 0.35 ms in bf16 and 0.18 ms in fp32, at 384 wide, 6 layers, 2.0 and 4.1 ms (2 cores, AVX512_BF16).
    """
    narrow = model.config.n_embd < NARROW and model.token_embedding.weight.device.type == "cpu"
    return torch.autocast("cpu", enabled=False) if narrow else nullcontext()


@torch.inference_mode()
def _read(cache: KVCache, rows: list[list[int]]) -> Tensor:
    """Bring the cache up to date with rows that each grew by one token (or are new): logits (B, V)."""
    starts = [window_start(len(row), cache.block_size) for row in rows]
    if cache.layers[0].kv_2BHSD is None:
        return cache.read([row[start:] for row, start in zip(rows, starts, strict=True)])
    moved = [i for i, length in enumerate(cache.lengths) if length == cache.block_size]
    logits = cache.step([row[-1] for row in rows])
    if moved:
        logits[moved] = cache.reread(moved, [rows[i][starts[i] :] for i in moved])
    return logits


Seed = int | Sequence[int]


def stream(
    model: BigramLanguageModelLoRA, prompts: Sequence[Sequence[int]], max_new_tokens: int, how: Sampling, seed: Seed
) -> Iterator[list[int | None]]:
    """Continue a batch of prompts (token ids, at least one each, of any lengths): yields one new token a row, and None
    for a row that a stop token has ended; it ends when all rows have.

    seed: one for all rows together, or one a row, whose text is then what it would be alone with that seed. The model
    is in evaluation mode while this runs. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    rows, cache, training = [list(prompt) for prompt in prompts], KVCache(model), model.training
    seeded = [torch.Generator().manual_seed(each) for each in ([seed] if isinstance(seed, int) else seed)]
    generators, ended = seeded[0] if isinstance(seed, int) else seeded, [False] * len(rows)
    model.eval()
    try:
        with cached_weights(model):
            for _ in range(max_new_tokens):
                with _products(model):
                    logits_BV = _read(cache, rows)
                seen = [row[window_start(len(row), cache.block_size) :] for row in rows]
                tokens = choose(logits_BV, seen, how, generators)
                for i, token in enumerate(tokens):
                    rows[i].append(token)  # also where a row has ended, so that the others are what they would be alone
                    ended[i] |= token in how.stop_ids
                if all(ended):
                    return
                yield [None if end else token for end, token in zip(ended, tokens, strict=True)]
    finally:
        model.train(training)


def generate(
    model: BigramLanguageModelLoRA, prompts: Sequence[Sequence[int]], max_new_tokens: int, how: Sampling, seed: Seed
) -> list[list[int]]:
    """The prompts with their continuations, as token ids, up to a stop token where one came."""
    rows = [list(prompt) for prompt in prompts]
    for tokens in stream(model, prompts, max_new_tokens, how, seed):
        for row, token in zip(rows, tokens, strict=True):
            row += [] if token is None else [token]
    return rows
