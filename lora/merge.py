"""Merge adapters into the weights: for a `with` block, for good, or tensor by tensor into what is written. And cache
effective weights for inference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.attach import adaptable_layers, adapter_names, adapter_parameters, check_unlocked, detach, using
from lora.functional import storage_key
from lora.layers.adaptable import CACHED, MERGED, Adaptable
from lora.layers.linear import LoRALinear
from runtime.errors import UsageError
from runtime.storage.quantized import Quantized


def _changed(model: nn.Module) -> dict[str, tuple[Adaptable, str]]:
    """Return each base tensor that the active adapters change, by its name: its layer, and what it is called there.

    Raises UsageError for a tensor that another layer shares, since merging would change that layer too.
    """
    found = {}
    names: dict[tuple, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            names[storage_key(p)].append(f"{path}.{name}")
    for place, layer in adaptable_layers(model).items():
        for name in filter(layer.changes, layer.base_tensors()):
            if len(shared := names[storage_key(getattr(layer, name))]) > 1:
                path, _, own = shared[-1].rpartition(".")
                owner = f"model.get_submodule({path!r})"
                raise UsageError(
                    f"{' and '.join(shared)} are one tensor, and merging into one of them would change all; "
                    f"untie them first: {owner}.{own} = torch.nn.Parameter({owner}.{own}.detach().clone())"
                )
            found[f"{place}.{name}"] = layer, name
    return found


class MergedTensors(Mapping[str, Tensor]):
    """A model's own tensors with the active adapters merged in fp32, each made when it is asked for and then rounded.

    The model does not change, and its merged tensors are never there together. A shared one has one name; one in 4 or 8
    bits is dense. described: the same on the meta device. rounded: whether that has changed a value of those that were
    made so far.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """dtype: of all of them, or None for those in which the base is stored. Raises UsageError for a tensor to merge
        into that several layers share."""
        adapters = adapter_parameters(model)
        self._own = {name: p.detach() for name, p in model.named_parameters() if p not in adapters}
        self._changed, self.rounded = _changed(model), False
        self.described = {
            name: torch.empty(p.shape, dtype=dtype or p.dtype, device="meta") for name, p in self._own.items()
        }

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        layer, own = self._changed.get(name, (None, ""))
        merged = self._own[name] if layer is None else layer.effective(own)
        merged = merged.dense() if isinstance(merged, Quantized) else merged.detach()
        written = merged.to(self.described[name].dtype)
        if torch.promote_types(merged.dtype, written.dtype) != written.dtype:
            self.rounded |= not torch.equal(written.to(merged.dtype), merged)
        return written

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)


def _undo(layer: Adaptable, name: str) -> Callable[[], None]:
    """What gives a layer's own tensor back the values that it has now, after `_write`."""
    base = getattr(layer, name)
    if isinstance(base, Quantized):
        return lambda: setattr(layer, name, base)
    before = base.clone()
    return lambda: base.copy_(before)


def _write(layer: Adaptable, name: str, effective: Tensor) -> None:
    """Give a layer's own tensor these values; one in 4 or 8 bits is replaced by a dense one."""
    base = getattr(layer, name)
    if isinstance(base, Quantized):
        setattr(layer, name, nn.Parameter(effective.to(base.dtype), requires_grad=False))
    else:
        base.copy_(effective)


@contextmanager
def _locked(layers: Iterable[Adaptable], by: str) -> Iterator[None]:
    """Refuse changes of weights and adapters inside the `with` block; an outer lock stays as it is."""
    free = [layer for layer in layers if not layer.locked_by]
    try:
        for layer in free:
            layer.locked_by = by
        yield
    finally:
        for layer in free:
            layer.locked_by = ""


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Merge the active adapters into the weights, in fp32, inside the `with` block; restore every bit afterwards.

    Raises UsageError where it is nested, and for a tensor to merge into that several layers share. Inside, loading a
    base, attaching, detaching and activating raise UsageError too.
    """
    check_unlocked(model)
    undo: list[Callable[[], None]] = []
    try:
        with torch.no_grad():
            for layer, name in _changed(model).values():
                undo.append(_undo(layer, name))
                _write(layer, name, layer.effective(name))
        with using(model), _locked(adaptable_layers(model).values(), MERGED):
            yield model
    finally:
        with torch.no_grad():
            for take_back in undo:
                take_back()


def merge(model: nn.Module) -> None:
    """Merge the active adapters into the weights for good, in fp32, and detach all adapters.

    Weights in 4 or 8 bits become dense ones. Inactive adapters are detached too, since their base has changed. The
    model stays frozen. Raises UsageError inside `merged` or `cached_weights`, and for a tensor to merge into that
    several layers share; then nothing is merged.
    """
    check_unlocked(model)
    with torch.no_grad():
        changed = [(layer, name, layer.effective(name)) for layer, name in _changed(model).values()]
        for each in changed:  # all computed before the first is written
            _write(*each)
    for name in adapter_names(model):
        detach(model, name)


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Cache the effective weights inside the `with` block, for inference; passes with gradients do not use the cache.

    Inside, loading a base, attaching and detaching raise UsageError.
    """
    layers = adaptable_layers(model).values()
    linears = [layer for layer in layers if isinstance(layer, LoRALinear) and layer.cache is None]
    try:
        for linear in linears:
            linear.cache = {}
        with _locked(layers, CACHED):
            yield model
    finally:
        for linear in linears:
            linear.cache = None
