"""Sampling text: the loop that streams tokens.

The model sees at most block_size positions. Past that the window moves on by half a block, re-reading its newer
half from position 0: `window_start` says where the window of the n-th token begins, for every prompt and row alike.
A token is therefore what a pass without a cache over that same window gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.merge import cached_weights
from models.generation.cache import KVCache
from models.generation.choosing import Sampling, choose

NARROW = 256  # see `matmul_dtype`


def window_start(n: int, block_size: int) -> int:
    """Where the window begins that the token after the first n is predicted from; it is at most block_size long."""
    half = max(1, block_size // 2)
    return math.ceil(max(0, n - block_size) / half) * half


@contextmanager
def matmul_dtype(model: nn.Module) -> Iterator[None]:
    """The dtype of matmuls while generating: the caller's, but fp32 for narrow models on the CPU, without oneDNN.

    What oneDNN computes takes 5 to 15 microseconds before it starts. So does a matmul in bf16: at 128 wide, 4 layers, a
    token's took 0.35 ms in bf16 and 0.18 ms in fp32, at 384 wide, 6 layers, 2.0 and 4.1 ms (2 cores, AVX512_BF16). And
    so does a GELU: 6 microseconds of 512 values, 1 without it.
    """
    if model.config.n_embd >= NARROW or model.token_embedding.weight.device.type != "cpu":
        yield
        return
    enabled = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = False
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def read_windows(model: nn.Module, cache: KVCache, windows: list[list[int]]) -> Tensor:
    """Read one window a row into an empty cache, a piece at a time: logits (B, V)."""
    logits_BV = model(cache.begin(windows), cache=cache)[0][:, 0]
    for start in range(cache.piece, max(map(len, windows)), cache.piece):
        found_BV = model(cache.begin(windows, start), cache=cache)[0][:, 0]
        ended_B1 = torch.tensor([[len(window) <= start] for window in windows], device=cache.device)
        logits_BV = torch.where(ended_B1, logits_BV, found_BV)
    return logits_BV


@torch.inference_mode()
def read(model: nn.Module, cache: KVCache, rows: list[list[int]]) -> Tensor:
    """Bring the cache up to date with rows that each grew by one token (or are new): logits (B, V)."""
    windows = [row[window_start(len(row), cache.block_size) :] for row in rows]
    if cache.is_empty:
        return read_windows(model, cache, windows)
    moved = [i for i, length in enumerate(cache.lengths) if length == cache.block_size]
    logits_BV = model(cache.advance([row[-1] for row in rows]), cache=cache)[0][:, 0]
    if moved:
        fresh = cache.emptied()
        logits_BV[moved] = read_windows(model, fresh, [windows[i] for i in moved])
        cache.replace(moved, fresh)
    return logits_BV


Seed = int | Sequence[int]


def stream(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, how: Sampling, seed: Seed
) -> Iterator[list[int | None]]:
    """Continue a batch of prompts (token ids, at least one each, of any lengths): yields one new token a row, and None
    for a row that a stop token has ended; it ends when all rows have.

    seed: one for all rows together, or one a row, whose text is then what it would be alone with that seed. The model
    is in evaluation mode until this ends, and passes without gradients compute with the weights that it had at the
    start; close it before training goes on. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    rows, training, weight = [list(prompt) for prompt in prompts], model.training, model.token_embedding.weight
    cache = KVCache(model.config.n_layer, model.config.max_positions, weight.device)
    seeded = [torch.Generator().manual_seed(each) for each in ([seed] if isinstance(seed, int) else seed)]
    generators, ended = seeded[0] if isinstance(seed, int) else seeded, [False] * len(rows)
    model.eval()
    try:
        with cached_weights(model):
            for _ in range(max_new_tokens):
                with matmul_dtype(model):
                    logits_BV = read(model, cache, rows)
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
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, how: Sampling, seed: Seed
) -> list[list[int]]:
    """The prompts with their continuations, as token ids, up to a stop token where one came."""
    rows = [list(prompt) for prompt in prompts]
    for tokens in stream(model, prompts, max_new_tokens, how, seed):
        for row, token in zip(rows, tokens, strict=True):
            row += [] if token is None else [token]
    return rows
