"""What a step need not keep for its backward pass, because it is nearly free to make again.

Inside `recompute`, autograd keeps no tensor that was marked `recomputable`: where it would, it keeps what makes the
tensor again, from others that it keeps in any case. Gradients are the same bits. Chen et al. 2016, "Training Deep Nets
with Sublinear Memory Cost", arXiv 1604.06174.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

Make = Callable[[], Tensor]


class _Marked(threading.local):
    """The tensors that are marked now, by where they are in memory; None outside `recompute`."""

    tensors: dict[int, tuple[weakref.ref[Tensor], Make]] | None = None


_marked = _Marked()


def recomputing() -> bool:
    """Whether what is cheap to make again should not be kept."""
    return _marked.tensors is not None


def recomputable(tensor: Tensor, make: Make) -> Tensor:
    """Mark a contiguous tensor, which is returned: make() makes it again, without gradients, of tensors that do not
    change before the backward pass."""
    if _marked.tensors is not None and tensor.requires_grad:
        _marked.tensors[tensor.data_ptr()] = weakref.ref(tensor), make
    return tensor


class _Recipe(NamedTuple):
    """What makes a tensor again, and how autograd saw it: transposed, or in another shape."""

    make: Make
    size: torch.Size
    stride: tuple[int, ...]


def _pack(saved: Tensor) -> Tensor | _Recipe:
    """What autograd keeps of a tensor that it wants to save. While a marked one lives, no other has its memory."""
    ref, make = _marked.tensors.get(saved.data_ptr(), (None, None)) if _marked.tensors else (None, None)
    marked = ref() if ref else None
    if marked is None or marked.numel() != saved.numel() or marked.dtype != saved.dtype:
        return saved
    return _Recipe(make, saved.shape, saved.stride())


def _unpack(kept: Tensor | _Recipe) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept.make().contiguous().as_strided(kept.size, kept.stride)


@contextmanager
def recompute() -> Iterator[None]:
    """Keep nothing that is marked inside the `with` block, in which a forward pass runs."""
    with making_again(), torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


@contextmanager
def making_again() -> Iterator[None]:
    """Only what asks `recomputing` keeps less inside the `with` block: for what is run again as a whole."""
    outer, _marked.tensors = _marked.tensors, {}
    try:
        yield
    finally:
        _marked.tensors = outer
