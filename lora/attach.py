"""Attach adapters to a model, choose which are active and how strongly, and detach them again.

Load the base first, then attach. Attaching freezes the base; only the tensors of the active adapters train.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.layers.adaptable import MERGED, Adaptable
from lora.layers.linear import LoRALinear
from lora.variants.lora import AdapterModule
from lora.variants.registry import variant_of
from runtime.errors import UsageError
from runtime.processes.pieces import whole

Strengths = dict[str, float]  # of adapters by name; an empty one means the plain base
REGEX = "re:"  # marks a regular expression for whole module paths, one of PEFT's ways to name targets


def adaptable_layers(model: nn.Module) -> dict[str, Adaptable]:
    """Return every layer of the model that can carry adapters, by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adaptable)}


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the attached adapters, in the order in which they were attached."""
    return list(dict.fromkeys(name for layer in adaptable_layers(model).values() for name in layer.lora))


def target_names(targets: str, presets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the module names that `targets` (a preset, or names separated by commas) stands for."""
    return presets.get(targets) or tuple(name.strip() for name in targets.split(",") if name.strip())


def find_targets(model: nn.Module, targets: str) -> list[str]:
    """Return the paths of the linears that `targets` (as in `LoRAConfig`) selects.

    Raises UsageError that names every target that matches nothing, and the names to choose from.
    """
    linears = [path for path, layer in adaptable_layers(model).items() if isinstance(layer, LoRALinear)]
    presets, aliases = getattr(model, "lora_presets", {}), getattr(model, "lora_aliases", {})
    if targets.startswith(REGEX):
        names, pattern = (targets,), targets.removeprefix(REGEX)
        matched = {targets: [path for path in linears if re.fullmatch(pattern, path)]}
    else:
        names = target_names(targets, presets)
        ends = {name: tuple(f".{own}" for own in aliases.get(name, (name,))) for name in names}
        matched = {name: [path for path in linears if f".{path}".endswith(ends[name])] for name in names}
    if missing := [name for name in names if not matched[name]] or ([targets] if not names else []):
        known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linears}))
        raise UsageError(
            f"lora_targets: {', '.join(map(repr, missing))} matches no linear of this model; "
            f"use {' or '.join(filter(None, [', '.join(presets), f'names from: {known}']))}"
        )
    found = [path for path in linears if any(path in paths for paths in matched.values())]
    for path, why in getattr(model, "lora_refused", {}).items():
        if path in found:
            raise UsageError(f"lora_targets: {path!r} cannot have an adapter in this model: {why}")
    return found


def new_modules(model: nn.Module, config: LoRAConfig) -> dict[str, AdapterModule]:
    """Create the modules of a fresh adapter, by the path of the layer they belong to. The model does not change.

    Raises UsageError for a config that its variant refuses, a target that matches nothing, biases to train where the
    model has none, and inside `merged` or `cached_weights`.
    """
    check_unlocked(model)
    variant, layers = variant_of(config), adaptable_layers(model)
    targets = set(find_targets(model, config.targets))
    if config.bias != "none" and all(getattr(layer, "bias", None) is None for layer in layers.values()):
        raise UsageError(
            f"lora_bias={config.bias}: this model has no biases to train; use lora_bias=none, "
            "or a base that was trained with BIAS=True"
        )
    modules, embeddings = {}, getattr(model, "lora_embeddings", ()) if config.train_embeddings else ()
    shared = variant.make_shared(config, [layers[path].shape for path in targets])
    for path, layer in layers.items():
        base = {name: whole(tensor) for name, tensor in layer.base_tensors().items()}
        module = AdapterModule(config)
        if path in targets:
            with base["weight"].device:
                module = variant(layer.shape, config, path, shared)
        if path in embeddings:
            module.add_copy("weight", base["weight"])
        if "bias" in base and (config.bias == "all" or (config.bias == "lora_only" and path in targets)):
            module.add_copy("bias", base["bias"])
        if any(True for _ in module.parameters()):
            module.to(next(iter(base.values())).device).sync_with_base(base)
            modules[path] = module
    return modules


def attach(model: nn.Module, config: LoRAConfig, name: str = "default") -> None:
    """Attach a fresh adapter, make it the active one and freeze everything else. The model's output stays the same.

    Raises UsageError for a name that is taken or invalid, and as `new_modules` does.
    """
    install(model, new_modules(model, config), name)


def install(model: nn.Module, modules: dict[str, AdapterModule], name: str) -> None:
    """Add an adapter's modules (from `new_modules`) to the model under a name and make it the only active adapter.

    Raises UsageError for a name that is taken or invalid.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name) or name in adapter_names(model):
        raise UsageError(f"adapter name {name!r}: must be new to this model, in letters, digits, '-' and '_'")
    layers = adaptable_layers(model)
    for path, module in modules.items():
        layers[path].lora[name] = module.train(model.training)
    activate(model, name)


def check_unlocked(model: nn.Module) -> None:
    """Raises UsageError inside `merged` and `cached_weights`, where weights and adapters must not change."""
    for layer in adaptable_layers(model).values():
        layer.check_unlocked()


def check_attached(model: nn.Module, *names: str) -> None:
    """Raises UsageError for a name that is not attached to the model."""
    attached = adapter_names(model)
    if unknown := [name for name in names if name not in attached]:
        raise UsageError(f"no adapter {unknown[0]!r} is attached; attached: {', '.join(attached) or 'none'}")


def _parse_strengths(model: nn.Module, adapters: tuple[str | Strengths, ...]) -> Strengths:
    """Return the arguments of `activate` as {name: strength}. Raises UsageError as `activate` does."""
    layers = adaptable_layers(model).values()
    if any(layer.locked_by == MERGED for layer in layers):  # it would count twice
        check_unlocked(model)
    if any(layer.mix for layer in layers):
        raise UsageError("inside `with mixing(model, names):`, each row has its own adapters; leave that block first")
    strengths: Strengths = {}
    for given in adapters:
        strengths |= {given: 1.0} if isinstance(given, str) else given
    check_attached(model, *strengths)
    for name, strength in strengths.items():
        if not math.isfinite(strength):
            raise UsageError(f"adapter {name!r}: its strength is {strength}, and must be a finite number")
    return strengths


def activate(model: nn.Module, *adapters: str | Strengths) -> None:
    """Make exactly these adapters active and trainable; with none, the model computes what its base computes.

    A name alone means strength 1; {name: strength} sets another. The strength multiplies what the adapter adds to
    weights, embeddings and biases, and active adapters add up. Create the optimizer after this call.

    Raises UsageError for a name that is not attached, a strength that is not finite, or inside `merged` or
    `mixing`.
    """
    _set_active(model, _parse_strengths(model, adapters))
    model.requires_grad_(False)
    for layer in adaptable_layers(model).values():
        for module in layer.active_modules():
            module.requires_grad_(True)


def active_adapters(model: nn.Module) -> Strengths:
    """Return the strengths of the active adapters by name, in the form that `activate` accepts."""
    return dict(next((layer.active for layer in adaptable_layers(model).values()), {}))


def _set_active(model: nn.Module, strengths: Strengths) -> None:
    for layer in adaptable_layers(model).values():
        layer.active = dict(strengths)


@contextmanager
def using(model: nn.Module, *adapters: str | Strengths) -> Iterator[nn.Module]:
    """Activate exactly these adapters inside the `with` block, given as in `activate`, for computing without gradients.

    What is trainable does not change. Raises UsageError as `activate` does.
    """
    before = active_adapters(model)
    _set_active(model, _parse_strengths(model, adapters))
    try:
        yield model
    finally:
        _set_active(model, before)


def detach(model: nn.Module, name: str) -> None:
    """Remove an adapter, which leaves the model's output and state dict as if it had never been attached.

    Raises UsageError for a name that is not attached, and inside `merged` or `cached_weights`.
    """
    check_unlocked(model)
    check_attached(model, name)
    activate(model, {other: s for other, s in active_adapters(model).items() if other != name})
    for layer in adaptable_layers(model).values():
        if name in layer.lora:
            del layer.lora[name]


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of all attached adapters, active or not."""
    return {p for layer in adaptable_layers(model).values() for p in layer.lora.parameters()}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's own parameters, as its checkpoint holds them; a shared one is under each of its names."""
    own = adapter_parameters(model)
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p not in own}
