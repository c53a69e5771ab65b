"""Linears without gradients: the tensors that many passes need are made once, and rows of a batch may each go through
adapters of their own.

x W^T is one product for all rows. Rows of one adapter stand together in tiles, and one batched product with the As of
all tiles, and one with their Bs, give what is added. Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", arXiv
2310.18547, and Sheng et al. 2023, "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", arXiv 2311.03285, do so in
one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.functional import added_product, added_to_product, cat_or_none
from runtime.storage.quantized import Quantized

SMALL = 2**20  # values of weights up to which concatenating them for one matmul pays
TILE = 8  # rows of a tile, always as many: how a product rounds depends on its shape
RANKS = 4  # the rank of a mix is a multiple of this, or how a batched product rounds would depend on the other tiles


class Tiles(NamedTuple):
    """Rows in tiles of one adapter each. rows (tiles * height,): with 0 where a tile is not full; None for all rows, in
    their order. places (rows,): where each row stands, or a place that is not full for one without an adapter; None
    where a row stands in several, or in none and all are full. adapters (tiles,): their numbers; None for all, in their
    order. strengths (tiles, height, 1): 0 where a tile is not full."""

    rows: Tensor | None
    places: Tensor | None
    adapters: Tensor | None
    strengths: Tensor


class Mix:
    """Which of some adapters each row of a batch goes through, and how strongly."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names, self.device = tuple(names), device
        self.changes: dict[tuple[nn.Module, str], Tensor | None] = {}  # of layers' tensors, (adapters, *shape)
        self.take([])

    def take(self, rows: Sequence[Mapping[str, float]]) -> None:
        """The strengths of each row of the next pass, by name; those left out are 0."""
        self.count, self._tiles = len(rows), {}
        self.rows_of = [[(i, row[name]) for i, row in enumerate(rows) if row.get(name)] for name in self.names]

    def tiles(self, height: int) -> Tiles:
        """The rows in tiles of a height, in the order of the adapters."""
        if height not in self._tiles:
            tiles = [
                (number, found[i : i + height])
                for number, found in enumerate(self.rows_of)
                for i in range(0, len(found), height)
            ]
            full = [entry for _, some in tiles for entry in (*some, *[(0, 0.0)] * (height - len(some)))]
            strengths = torch.tensor([s for _, s in full], device=self.device).view(len(tiles), height, 1)
            rows = self._index([row for row, _ in full], self.count)
            numbers = self._index([i for i, _ in tiles], len(self.names))
            self._tiles[height] = Tiles(rows, self._places(full), numbers, strengths)
        return self._tiles[height]

    def _places(self, full: list[tuple[int, float]]) -> Tensor | None:
        """The places of the rows in full tiles, see `Tiles`."""
        taken = [(row, place) for place, (row, strength) in enumerate(full) if strength]
        spare = next((place for place, (_, strength) in enumerate(full) if not strength), None)
        found = dict(taken)
        if len(found) < len(taken) or (spare is None and len(found) < self.count):
            return None
        return torch.tensor([found.get(row, spare) for row in range(self.count)], device=self.device)

    def _index(self, numbers: list[int], count: int) -> Tensor | None:
        """Numbers as an index, None for all below a count in their order."""
        return None if numbers == list(range(count)) else torch.tensor(numbers, dtype=torch.long, device=self.device)

    def low_rank(self, x_BTI: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """What the adapters' low-rank products add, (B, T, out), for A (adapters, in, rank) and B (adapters, rank,
        out)."""
        T, width = x_BTI.shape[1:]
        height = TILE if T == 1 else 1
        rows, places, adapters, strengths = self.tiles(height)
        if adapters is not None:
            A, B = A.index_select(0, adapters), B.index_select(0, adapters)
        tiled = (x_BTI if rows is None else x_BTI.index_select(0, rows)).view(len(A), height * T, width)
        with torch.autocast(self.device.type, enabled=False):
            low = torch.bmm(tiled.to(A.dtype), A) * strengths
            added = torch.bmm(low.to(A.dtype), B).view(-1, T, B.shape[-1]).to(x_BTI.dtype)
        if rows is None:
            return added
        if places is not None:  # quicker than adding to zeros
            return added.index_select(0, places)
        return added.new_zeros(self.count, *added.shape[1:]).index_add_(0, rows, added)

    def add_changes(self, y_BTC: Tensor, changes: Tensor, idx_BT: Tensor | None = None) -> Tensor:
        """Add to y what the adapters change in a bias, (adapters, C), or in the rows idx of a table, (adapters, n, C);
        returns it."""
        rows, _, adapters, strengths = self.tiles(1)
        changes = changes if adapters is None else changes.index_select(0, adapters)
        if idx_BT is None:
            found = changes[:, None].expand(-1, y_BTC.shape[1], -1)
        else:
            idx = idx_BT if rows is None else idx_BT[rows]
            found = changes[torch.arange(len(changes), device=self.device)[:, None], idx]
        found = (strengths * found).to(y_BTC.dtype)
        return y_BTC.add_(found) if rows is None else y_BTC.index_add_(0, rows, found)

    def add_product(self, y_BTO: Tensor, x_BTI: Tensor, number: int, change: Tensor) -> None:
        """Add to y what an adapter's change of a weight (out, in) gives."""
        if found := self.rows_of[number]:
            rows, strengths = (torch.tensor(each, device=self.device) for each in zip(*found, strict=True))
            y_BTO.index_add_(0, rows, strengths[:, None, None] * F.linear(x_BTI[rows], change))


class Cached(NamedTuple):
    """What a linear computes with: a weight in the compute dtype, or one with a low-rank update, A (rank, in) and B
    (out, rank), to be added. A weight in another dtype than x: the linear is computed in that dtype.

    For a mix, A (adapters, in, rank) and B (adapters, rank, out), what adapters change in the bias (adapters, out), and
    with the number of the adapter in the weight (out, in), where that is no low rank.
    """

    W: Tensor
    bias: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None
    bias_changes: Tensor | None = None
    weight_changes: tuple[tuple[int, Tensor], ...] = ()


class Prepared(NamedTuple):
    """What linears of one input compute with in a dtype, while these adapters are active, or in the mix: each with a
    part of its own, all with one, or none, so that each is to be called by itself."""

    active: Mapping[str, float]
    mix: Mix | None
    dtype: torch.dtype
    parts: list[Cached]


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors (n, m) as one, uncopied, where they lie one after the other in memory; else None."""
    first, place = tensors[0], tensors[0].storage_offset()
    if any(isinstance(t, Quantized) for t in tensors):
        return None
    for t in tensors:
        here = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and t.storage_offset() == place
        if not (here and t.is_contiguous() and t.dtype == first.dtype):
            return None
        place += t.numel()
    return first.detach().as_strided((sum(map(len, tensors)), first.shape[1]), first.stride())


def block_diagonal(matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices (n, m), or batches of as many (batch, n, m), along the diagonal of one that is 0 elsewhere."""
    if matrices[0].dim() == 2:
        return torch.block_diag(*matrices)
    return torch.stack([torch.block_diag(*some) for some in zip(*matrices, strict=True)])


def joined_cache(found: list[Cached]) -> list[Cached]:
    """Return the tensors of several linears as those of one, where that costs no copy of large weights."""
    Ws, biases, As, Bs, bias_changes, weight_changes = zip(*found, strict=True)
    unlike = any(len({t is None for t in some}) > 1 for some in (As, bias_changes)) or any(weight_changes)
    if len(found) == 1 or unlike or len({W.dtype for W in Ws}) > 1 or any(isinstance(W, Quantized) for W in Ws):
        return found
    W = joined(Ws)
    if W is None and sum(W.numel() for W in Ws) > SMALL:
        return found
    W, A, B = torch.cat(Ws) if W is None else W, None, None
    if As[0] is not None:
        A, B = torch.cat(As, 0 if As[0].dim() == 2 else 2), block_diagonal(Bs)
    return [Cached(W, cat_or_none(biases), A, B, None if bias_changes[0] is None else torch.cat(bias_changes, 1))]


def product(x: Tensor, linear: Cached, mix: Mix | None) -> Tensor:
    """Apply a linear to x (..., in), or to x (B, T, in) where its rows go through a mix of adapters: (..., out)."""
    W, bias, A, B, _, _ = linear
    quantized = isinstance(W, Quantized)
    if W.dtype is not x.dtype and not quantized:
        with torch.autocast(x.device.type, enabled=False):
            return product(x.to(W.dtype), linear, mix).to(x.dtype)
    if mix:
        return _mixed_product(x, linear, mix)
    if A is None:  # in x's dtype, which is the one that autocast would choose
        return F.linear(x, W.to(x.dtype) if quantized else W, bias)
    tokens = x.reshape(-1, x.shape[-1])
    return added_product(tokens, tokens @ A.t(), W.to(x.dtype), B, bias).view(*x.shape[:-1], W.shape[0])


def _mixed_product(x_BTI: Tensor, linear: Cached, mix: Mix) -> Tensor:
    """Apply a linear through a mix of adapters: (B, T, out)."""
    W, bias, A, B, bias_changes, weight_changes = linear
    W = W.to(x_BTI.dtype)
    if A is None:
        y_BTO = F.linear(x_BTI, W, bias)
    else:
        low_BTO = mix.low_rank(x_BTI, A, B)
        y_BTO = added_to_product(low_BTO.flatten(0, 1), x_BTI.flatten(0, 1), W, bias).view(low_BTO.shape)
    for number, change in weight_changes:
        mix.add_product(y_BTO, x_BTI, number, change)
    return y_BTO if bias_changes is None else mix.add_changes(y_BTO, bias_changes)
