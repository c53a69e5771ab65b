"""The key-value cache: what each row of a batch has been read, and the pass through the model that is under way.

It is passive: it makes token ids for the next pass, keeps keys and values, and knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import causal_attention

GROWTH = 256  # positions that a cache has room for at first, and by which it grows at least
STEP = 64  # the width of a cache whose rows come and go is a multiple of this

# Positions of a window that the CPU reads in a pass. In pieces of 128, 256 and 512, 1,024 of SmolLM2-135M took 1.07,
# 0.98 and 0.94 of the time of one pass, and 2,000 took 0.71, 0.65 and 0.64; the longest piece of these took 0.19, 0.34
# and 0.63 s (the least of 5, bf16, one thread, AVX512_BF16).
PIECE = 256


class LayerCache:
    """Keys and values of one layer, (B, K, room, D) each; of each row the first `lengths` positions are filled.

    On the CPU they are kept in fp32: with one query a row, torch's kernel takes 2 to 4 times as long in bf16.
    """

    held: tuple[Tensor, Tensor] | None = None

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def make_room(self, like_BKTD: Tensor) -> None:
        """Room for the width of the pass under way, at least half as much again as there was."""
        before = self.held[0].shape[2] if self.held else 0
        if before >= self.cache.width:
            return
        B, (_, K, _, D) = len(self.cache.lengths), like_BKTD.shape
        room = min(self.cache.block_size, max(self.cache.width, before + before // 2, GROWTH))
        dtype = torch.float32 if like_BKTD.device.type == "cpu" else like_BKTD.dtype
        larger = tuple(like_BKTD.new_zeros(B, K, room, D, dtype=dtype) for _ in range(2))
        for new, old in zip(larger, self.held or (), strict=False):
            new[:, :, :before] = old
        self.held = larger

    def store(self, k_BKTD: Tensor, v_BKTD: Tensor) -> bool:
        """Keep new keys and values; True where they are at the beginning, and attend to nothing else."""
        self.make_room(k_BKTD)
        start, T = self.cache.start, k_BKTD.shape[2]
        for held_BKSD, new_BKTD in zip(self.held, (k_BKTD, v_BKTD), strict=True):
            if start is not None:
                held_BKSD.narrow(2, start, T).copy_(new_BKTD)
            else:
                rows_B, at_B = self.cache.at
                held_BKSD[rows_B, :, at_B] = new_BKTD[:, :, 0].to(held_BKSD.dtype)
        return start == 0

    def attend(self, q_BHTD: Tensor) -> Tensor:
        """New queries, each over all that its row holds up to its own position: (B, H, T, D).

        Heads that share keys and values are taken as so many queries of one head.
        """
        k, v = (held_BKSD.narrow(2, 0, self.cache.width) for held_BKSD in self.held)
        if q_BHTD.shape[2] > 1:
            return causal_attention(q_BHTD, k.to(q_BHTD.dtype), v.to(q_BHTD.dtype), 0.0)
        q = q_BHTD.reshape(*k.shape[:2], -1, k.shape[-1]).to(k.dtype)
        with self.cache.no_casts:  # autocast would cast all keys and values anew for every token
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.cache.seen_B11S)
        return y.reshape(q_BHTD.shape).to(q_BHTD.dtype)


class KVCache:
    """Keys and values of all layers, and what the pass that is under way reads.

    Windows are read right-padded: under a causal mask nothing real attends to the padding, and its keys are
    overwritten or hidden afterwards. Then every row takes one token at a time, each at its own position.
    """

    start: int | None  # the position of the first token of this pass, if that is the same for all rows
    places = False  # whether rows come and go, each in a place of its own
    width: int  # how many positions the longest row holds
    at: tuple[Tensor, Tensor]  # of one token a row, if they differ: rows and positions
    seen_B11S: Tensor | None  # of one token a row: what each row holds, where that is not the same for all

    def __init__(self, n_layer: int, block_size: int, device: torch.device) -> None:
        self.block_size, self.device = block_size, device
        self.piece = PIECE if device.type == "cpu" else block_size
        self.lengths: list[int] = []  # of each row, what this pass adds included
        self.layers = [LayerCache(self) for _ in range(n_layer)]

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been read yet."""
        return self.layers[0].held is None

    @property
    def no_casts(self) -> AbstractContextManager:
        """Inside, autocast casts nothing."""
        on = torch.is_autocast_enabled(self.device.type)
        return torch.autocast(self.device.type, enabled=False) if on else nullcontext()

    def grow(self, lengths: list[int]) -> None:
        """The rows are so long now. Where they come and go, the width takes coarse steps, so that what a row gets does
        not depend on how long the others are."""
        longest, self.lengths = max(lengths), lengths
        self.width = min(self.block_size, -(-longest // STEP) * STEP) if self.places else longest

    def begin(self, windows: Sequence[Sequence[int]], start: int = 0) -> Tensor:
        """Start a pass that reads a piece of one window a row, from a position up to which all have been read: its
        token ids (B, T), padded on the right. A window that ended before gets padding only."""
        stop = start + self.piece
        self.grow([min(len(window), stop) for window in windows])
        self.start, T = start, self.width - start
        self.seen_B11S = None
        pieces = [window[start:stop] for window in windows]
        return torch.tensor([[*piece, *[0] * (T - len(piece))] for piece in pieces], device=self.device)

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Start a pass that reads one more token a row: its token ids (B, 1). Afterwards read a full row anew."""
        at = [min(length, self.block_size - 1) for length in self.lengths]
        self.grow([position + 1 for position in at])
        self.start = at[0] if len(set(at)) == 1 and not self.places else None
        self.seen_B11S = None
        if self.start is None:
            self.at = torch.arange(len(at), device=self.device), torch.tensor(at, device=self.device)
            columns_S = torch.arange(self.width, device=self.device)
            self.seen_B11S = (columns_S <= self.at[1][:, None])[:, None, None]
        return torch.tensor(tokens, device=self.device)[:, None]

    def emptied(self) -> KVCache:
        """A new cache of the same sizes."""
        return KVCache(len(self.layers), self.block_size, self.device)

    def open_places(self, count: int) -> None:
        """Have places for so many rows that come and go, by `replace` and `empty`.

        Each pass goes through all places, so that the shapes of its matmuls, and how they round, are always the same.
        """
        self.places, self.lengths = True, [0] * count

    def empty(self, rows: Iterable[int]) -> None:
        """Forget these rows. What an empty place is given in a pass is not kept in mind."""
        for row in rows:
            self.lengths[row] = 0

    def replace(self, rows: list[int], other: KVCache) -> None:
        """Take the rows of another cache in place of these."""
        taken = dict(zip(rows, other.lengths, strict=True))
        self.grow([taken.get(row, length) for row, length in enumerate(self.lengths)])
        for layer, others in zip(self.layers, other.layers, strict=True):
            layer.make_room(others.held[0])
            for here, there in zip(layer.held, others.held, strict=True):
                here[rows, :, : other.width] = there[:, :, : other.width]

    def reorder(self, rows: list[int]) -> None:
        """Take these rows, in this order, some perhaps more than once, in place of all."""
        for layer in self.layers:
            layer.held = tuple(held_BKSD[rows] for held_BKSD in layer.held)
        self.lengths = [self.lengths[row] for row in rows]

    def positions(self, T: int) -> Tensor:
        """The positions of the pass under way, for the position embedding: (T,) or (B, 1)."""
        if self.start is None:
            return self.at[1][:, None]
        return torch.arange(self.start, self.start + T, device=self.device)

    def last(self, x_BTC: Tensor) -> Tensor:
        """Of each row, the last real position of this pass: (B, 1, C)."""
        if x_BTC.shape[1] == 1:
            return x_BTC
        at = torch.tensor(self.lengths, device=self.device) - 1 - self.start
        return x_BTC[torch.arange(len(x_BTC), device=self.device), at.clamp(min=0), None]
