"""Sampling text: the loop that streams tokens.

The model sees at most block_size positions. Past that the window moves on by half a block, re-reading its newer
half from position 0: `window_start` says where the window of the n-th token begins, for every prompt and row alike.
A token is therefore what a pass without a cache over that same window gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lora.merge import cached_weights
from models.generation.cache import KVCache
from models.generation.choosing import Sampling, choose

NARROW = 256  # see `run_pass`


def window_start(n: int, block_size: int) -> int:
    """Where the window begins that the token after the first n is predicted from; it is at most block_size long."""
    half = max(1, block_size // 2)
    return math.ceil(max(0, n - block_size) / half) * half


def window(text: list[int], block_size: int) -> list[int]:
    """What the model sees of a text."""
    return text[window_start(len(text), block_size) :]


@contextmanager
def without_onednn() -> Iterator[None]:
    """Inside, torch computes on the CPU with kernels that start at once."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def run_pass(model: nn.Module, cache: KVCache, idx: Tensor) -> Tensor:
    """A pass through the model over what `KVCache.begin` or `advance` returned: the logits (B, V) of each row's last
    position. Matmuls are in the caller's dtype, but on the CPU in fp32 for narrow models, and without oneDNN for these
    and for a single token.

    What oneDNN computes there, all matmuls in bf16 and GELUs, takes 5 to 15 microseconds before it starts. At 128 wide,
    4 layers, a token's matmuls took 0.35 ms in bf16 and 0.18 in fp32, at 384 wide, 6 layers, 2.0 and 4.1 ms. With one
    row, torch's own kernel took 0.69 of oneDNN's time in bf16 at 384 wide and 0.57 at 576 (2 cores, AVX512_BF16); with
    two it takes as long, with four twice as long.
    """
    on_cpu = idx.device.type == "cpu"
    narrow = on_cpu and model.config.n_embd < NARROW
    casts = torch.autocast("cpu", enabled=False) if narrow and torch.is_autocast_enabled("cpu") else nullcontext()
    with casts, without_onednn() if narrow or (on_cpu and idx.numel() == 1) else nullcontext():
        return model(idx, cache=cache)[0][:, 0]


def read_windows(model: nn.Module, cache: KVCache, windows: list[list[int]]) -> Tensor:
    """Read one window a row into an empty cache, a piece at a time: logits (B, V)."""
    logits_BV = run_pass(model, cache, cache.begin(windows))
    for start in range(cache.piece, max(map(len, windows)), cache.piece):
        found_BV = run_pass(model, cache, cache.begin(windows, start))
        ended_B1 = torch.tensor([[len(window) <= start] for window in windows], device=cache.device)
        logits_BV = torch.where(ended_B1, logits_BV, found_BV)
    return logits_BV


@torch.inference_mode()
def read(model: nn.Module, cache: KVCache, rows: list[list[int]]) -> Tensor:
    """Bring the cache up to date with rows that each grew by one token (or are new): logits (B, V)."""
    if cache.is_empty:
        return read_windows(model, cache, [window(row, cache.block_size) for row in rows])
    moved = [i for i, length in enumerate(cache.lengths) if length == cache.block_size]
    logits_BV = run_pass(model, cache, cache.advance([row[-1] for row in rows]))
    if moved:
        fresh = cache.emptied()
        logits_BV[moved] = read_windows(model, fresh, [window(rows[i], cache.block_size) for i in moved])
        cache.replace(moved, fresh)
    return logits_BV


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; walking through its modules takes as long as a token of a small one."""
    training = model.training
    try:
        if training:
            model.eval()
        yield
    finally:
        if training:
            model.train()


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
    rows, weight = [list(prompt) for prompt in prompts], model.token_embedding.weight
    cache = KVCache(model.config.n_layer, model.config.max_positions, weight.device)
    seeded = [torch.Generator().manual_seed(each) for each in ([seed] if isinstance(seed, int) else seed)]
    generators, ended = seeded[0] if isinstance(seed, int) else seeded, [False] * len(rows)
    with evaluating(model), cached_weights(model):
        for _ in range(max_new_tokens):
            logits_BV = read(model, cache, rows)
            penalised = rows if how.repetition_penalty != 1 else ()
            seen = [window(row, cache.block_size) for row in penalised]
            tokens = choose(logits_BV, seen, how, generators)
            for i, token in enumerate(tokens):
                rows[i].append(token)  # also where a row has ended, so that the others are what they would be alone
                ended[i] |= token in how.stop_ids
            if all(ended):
                return
            yield [None if end else token for end, token in zip(ended, tokens, strict=True)]


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, how: Sampling, seed: Seed
) -> list[list[int]]:
    """The prompts with their continuations, as token ids, up to a stop token where one came."""
    rows = [list(prompt) for prompt in prompts]
    for tokens in stream(model, prompts, max_new_tokens, how, seed):
        for row, token in zip(rows, tokens, strict=True):
            row += [] if token is None else [token]
    return rows
