"""Attach adapters to a model, choose which are active and how strongly, merge them, take them off again.

The base is loaded first and adapters are attached afterwards; from then on the base is frozen, and what trains is
exactly what the active adapters hold.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.layers import Adaptable, LoRALinear
from lora.variants.lora import AdapterTensors
from lora.variants.registry import checked
from runtime.errors import UsageError

MERGED, UNCHANGING = "merged", "unchanging"  # what may hold a model

REGEX = "re:"  # before a regular expression for whole module paths, as adapters of PEFT may name their targets


def hosts(model: nn.Module) -> dict[str, Adaptable]:
    """Every layer of the model that can carry adapters, by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adaptable)}


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters attached to the model, in the order they came."""
    return list(dict.fromkeys(name for host in hosts(model).values() for name in host.lora))


def target_names(targets: str, presets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The names that `targets` (a preset, or names separated by commas) stands for."""
    return presets.get(targets) or tuple(name.strip() for name in targets.split(",") if name.strip())


def target_paths(model: nn.Module, targets: str) -> list[str]:
    """The paths of the linears that `targets` (as in `LoRAConfig`) stands for.

    Raises UsageError that names every target that matches nothing, and what there is.
    """
    linears = [path for path, host in hosts(model).items() if isinstance(host, LoRALinear)]
    presets = getattr(model, "lora_presets", {})
    if targets.startswith(REGEX):
        names, pattern = (targets,), targets.removeprefix(REGEX)
        matched = {targets: [path for path in linears if re.fullmatch(pattern, path)]}
    else:
        names = target_names(targets, presets)
        matched = {name: [path for path in linears if f".{path}".endswith(f".{name}")] for name in names}
    if missing := [name for name in names if not matched[name]] or ([targets] if not names else []):
        known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linears}))
        raise UsageError(
            f"lora_targets: {', '.join(map(repr, missing))} matches no linear of this model; "
            f"use {' or '.join(filter(None, [', '.join(presets), f'names out of: {known}']))}"
        )
    return [path for path in linears if any(path in paths for paths in matched.values())]


def make_entries(model: nn.Module, config: LoRAConfig) -> dict[str, AdapterTensors]:
    """Fresh tensors of one adapter for every layer it has any on, by path; the model is not touched.

    Raises UsageError for a config that makes no sense for its variant, a target that matches nothing, trained biases
    on a model without them, and inside `merged` and `unchanging`.
    """
    check_free(model)
    variant = checked(config)
    targets = set(target_paths(model, config.targets))
    if config.bias != "none" and not any(getattr(host, "bias", None) is not None for host in hosts(model).values()):
        raise UsageError(
            f"lora_bias={config.bias}: this model has no biases to train; use lora_bias=none, "
            "or a base that was trained with BIAS=True"
        )
    entries, embeddings = {}, getattr(model, "lora_embeddings", ()) if config.train_embeddings else ()
    shared = variant.share(config, [model.get_submodule(path).shape for path in targets])
    for path, host in hosts(model).items():
        base, entry = host.base_tensors(), AdapterTensors(config)
        if path in targets:
            with base["weight"].device:
                entry = variant(host.shape, config, path, shared)
        if path in embeddings:
            entry.add_copy("weight", base["weight"])
        if "bias" in base and (config.bias == "all" or (config.bias == "lora_only" and path in targets)):
            entry.add_copy("bias", base["bias"])
        if any(True for _ in entry.parameters()):
            entry.to(next(iter(base.values())).device).follow(base)
            entries[path] = entry
    return entries


def attach(model: nn.Module, config: LoRAConfig, name: str = "default") -> None:
    """Give the model a fresh adapter, activate it and freeze everything else. Its output does not change yet.

    Raises UsageError for a name that is taken or unfit, a target that matches nothing, or biases there are none of.
    """
    install(model, make_entries(model, config), name)


def install(model: nn.Module, entries: dict[str, AdapterTensors], name: str) -> None:
    """Put an adapter's tensors (as from `make_entries`) on the model under a name, and activate it alone.

    Raises UsageError for a name that is taken or unfit.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name) or name in adapter_names(model):
        raise UsageError(f"adapter name {name!r}: must be new to this model, in letters, digits, '-' and '_'")
    layers = hosts(model)
    for path, entry in entries.items():
        layers[path].lora[name] = entry.train(model.training)
    activate(model, name)


def check_free(model: nn.Module) -> None:
    """Raises UsageError inside `merged` and `unchanging`, which rely on weights and adapters staying as they are."""
    for host in hosts(model).values():
        host.check_free()


def check_attached(model: nn.Module, *names: str) -> None:
    """Raises UsageError for a name that is not attached to the model."""
    attached = adapter_names(model)
    if unknown := [name for name in names if name not in attached]:
        raise UsageError(f"no adapter {unknown[0]!r} is attached; attached: {', '.join(attached) or 'none'}")


def _strengths(model: nn.Module, adapters: tuple[str | Mapping[str, float], ...]) -> dict[str, float]:
    """What `activate` was given, as one strength a name. Raises UsageError as it does."""
    if any(host.held_by == MERGED for host in hosts(model).values()):  # else they would be added once more
        check_free(model)
    strengths: dict[str, float] = {}
    for given in adapters:
        strengths |= {given: 1.0} if isinstance(given, str) else given
    check_attached(model, *strengths)
    for name, strength in strengths.items():
        if not math.isfinite(strength):
            raise UsageError(f"adapter {name!r}: its strength is {strength}, and must be a finite number")
    return strengths


def activate(model: nn.Module, *adapters: str | Mapping[str, float]) -> None:
    """Make exactly these adapters count, and train; none leaves the plain base. The base stays frozen.

    A name counts at strength 1; {name: strength} sets it: the base plus strength times what the adapter adds to
    weights, embeddings and biases alike. What several add is summed. An optimizer is to be made after this choice.

    Raises UsageError for a name that is not attached, a strength that is not finite, or inside `merged`.
    """
    _switch(model, _strengths(model, adapters))
    model.requires_grad_(False)
    for host in hosts(model).values():
        for entry in host.entries():
            entry.requires_grad_(True)


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters that count now, by name, with their strengths; `activate` takes them back."""
    return dict(next((host.active for host in hosts(model).values()), {}))


def _switch(model: nn.Module, strengths: Mapping[str, float]) -> None:
    for host in hosts(model).values():
        host.active = dict(strengths)


@contextmanager
def using(model: nn.Module, *adapters: str | Mapping[str, float]) -> Iterator[nn.Module]:
    """The model with exactly these adapters counting, given as in `activate`; afterwards as before.

    What trains is not touched, so this is for computing without gradients.
    """
    before = active_adapters(model)
    _switch(model, _strengths(model, adapters))
    try:
        yield model
    finally:
        _switch(model, before)


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter off the model, whose output and state dict are then as if it had never been there.

    Raises UsageError for a name that is not attached.
    """
    check_free(model)
    check_attached(model, name)
    activate(model, {other: s for other, s in active_adapters(model).items() if other != name})
    for host in hosts(model).values():
        if name in host.lora:
            del host.lora[name]


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Every parameter that belongs to an adapter, active or not."""
    return {p for host in hosts(model).values() for p in host.lora.parameters()}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters: what its checkpoint holds, whatever is attached, and one that several layers share
    under each of its names."""
    own = adapter_parameters(model)
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p not in own}


def _changed(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each base tensor that the active adapters change, and what they make of it.

    Raises UsageError, before it comes to it, for one that another layer shares, whose output would change too.
    """
    names: dict[tuple, list[str]] = defaultdict(list)  # of all that lies in one place
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            names[_place(p)].append(f"{path}.{name}")
    for host in hosts(model).values():
        for name, effective in host.effective_tensors().items():
            base = getattr(host, name)
            if effective is base:
                continue
            if len(shared := names[_place(base)]) > 1:
                path, _, own = shared[-1].rpartition(".")
                layer = f"model.get_submodule({path!r})"
                raise UsageError(
                    f"{' and '.join(shared)} are one tensor, and merging into one of them would change all; "
                    f"untie them first: {layer}.{own} = torch.nn.Parameter({layer}.{own}.detach().clone())"
                )
            yield base, effective


def _place(tensor: Tensor) -> tuple:
    """Equal for tensors that are one in memory, also where they are different objects."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()


@contextmanager
def _held(model: nn.Module, by: str) -> Iterator[None]:
    """The model inside a context manager that relies on nobody changing it, unless it is inside one already."""
    free = [host for host in hosts(model).values() if not host.held_by]
    try:
        for host in free:
            host.held_by = by
        yield
    finally:
        for host in free:
            host.held_by = ""


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its active adapters written into its weights, in fp32; afterwards as before, bit for bit.

    Raises UsageError inside itself, and for a change of a tensor that several layers share. So do, inside of it,
    loading a base and all that changes which adapters there are or count.
    """
    check_free(model)
    saved: list[tuple[Tensor, Tensor]] = []
    active = active_adapters(model)
    try:
        with torch.no_grad():
            for base, effective in _changed(model):
                saved.append((base, base.clone()))
                base.copy_(effective)
        _switch(model, {})
        with _held(model, MERGED):
            yield model
    finally:
        _switch(model, active)
        with torch.no_grad():
            for base, before in saved:
                base.copy_(before)


def merge(model: nn.Module) -> None:
    """Write the active adapters into the model's weights for good, in fp32, and take all adapters off.

    Those that rest come off too: they were trained on a base that is now another one. The model stays frozen. Raises
    UsageError inside `merged`, and for a change of a tensor that several layers share; nothing is merged then.
    """
    check_free(model)
    with torch.no_grad():
        for base, effective in list(_changed(model)):  # all of it is computed by now, so nothing is left half merged
            base.copy_(effective)
    for name in adapter_names(model):
        detach(model, name)


@contextmanager
def unchanging(model: nn.Module) -> Iterator[nn.Module]:
    """The model while nobody changes its weights or adapters: without gradients it keeps what it computes with.

    The weights themselves stay as they are, and so does what is computed with gradients.
    """
    linears = [host for host in hosts(model).values() if isinstance(host, LoRALinear) and host.kept is None]
    try:
        for linear in linears:
            linear.kept = {}
        with _held(model, UNCHANGING):
            yield model
    finally:
        for linear in linears:
            linear.kept = None
