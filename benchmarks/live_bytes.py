"""What tensors are alive while torch computes: every storage that an operation makes, until nobody holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the `with` block and still alive.

    known: tensors that were there before, which are not counted. label(tensor): what a new tensor is counted as.
    peak: the most bytes at a time since it was last set to 0.
    """

    def __init__(self, known: Iterable[Tensor] = (), label: Callable[[Tensor], str] = lambda tensor: "") -> None:
        super().__init__()
        self.label, self.peak = label, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        made = [t for t in pytree.tree_leaves(found) if type(t) in (Tensor, torch.nn.Parameter)]
        for tensor in made:
            storage = tensor.untyped_storage()
            ref = self._alive.get(storage._cdata)
            if storage._cdata not in self._known and (ref is None or ref[0].expired()):
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), self.label(tensor)
        self.peak = max(self.peak, sum(self.by_label().values()))
        return found

    def by_label(self) -> Counter[str]:
        """The bytes that are alive now, by what they were counted as."""
        self._alive = {key: row for key, row in self._alive.items() if not row[0].expired()}
        found: Counter[str] = Counter()
        for _, size, label in self._alive.values():
            found[label] += size
        return found
