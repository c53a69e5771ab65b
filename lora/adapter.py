"""An adapter as a value: its config and its tensors, independent of any model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lora.attach import adaptable_layers, base_tensors, check_attached, install, new_modules, target_names
from lora.config import LoRAConfig
from lora.variants.lora import AdapterModule, LoRA
from lora.variants.registry import VARIANTS
from runtime.errors import UsageError, UserError, join_problems
from runtime.storage.tensors import differences, fingerprint

SHARED = "shared_sha256"  # a key of the metadata: the fingerprint of the tensors that all layers share
COPIES = ("weight", "bias")  # names of trained copies of the base's tensors


@dataclass(frozen=True)
class Adapter:
    """tensors: {module path: {tensor name: tensor}}, with the variant's names and shapes, as A (rank, in), and `weight`
    and `bias` for trained copies of the base's. metadata: what else its file says, `base_sha256` above all. of_base:
    weights that the base must have, by module path, where PEFT's file repeats some."""

    config: LoRAConfig
    tensors: dict[str, dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)
    of_base: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_model(cls, model: nn.Module, name: str = "default", **metadata: str) -> Adapter:
        """Copy an attached adapter to the CPU, and give it this metadata.

        Raises UsageError for a name that is not attached.
        """
        check_attached(model, name)
        modules = {path: layer.lora[name] for path, layer in adaptable_layers(model).items() if name in layer.lora}
        tensors = {
            path: {key: p.detach().cpu().clone() for key, p in module.adapter_state().items()}
            for path, module in modules.items()
        }
        config = next(iter(modules.values())).config
        ranks = {path: module.current_rank() for path, module in modules.items() if isinstance(module, LoRA)}
        others = {path: rank for path, rank in ranks.items() if rank != config.rank_at(path)}
        # first, as the first that matches counts, and with their own values where a path was a pattern before
        config = replace(config, rank_pattern=others | dict(config.rank_pattern) | others) if others else config
        return cls(config, tensors, metadata | shared_metadata(modules.values()))

    def named_tensors(self) -> dict[str, Tensor]:
        """Return its tensors as {<module path>.<tensor name>: tensor}."""
        return {f"{path}.{key}": t for path, group in self.tensors.items() for key, t in group.items()}

    def targets(self) -> list[str]:
        """Return the paths of the linears that it adapts."""
        return [path for path, group in self.tensors.items() if not group.keys() <= set(COPIES)]

    def target_modules(self) -> list[str]:
        """Return the names of the linears that it adapts: the config's, or for a preset of its model, the last parts
        of their paths."""
        paths, names = self.targets(), target_names(self.config.targets, {})
        named = all(any(f".{path}".endswith(f".{name}") for path in paths) for name in names)
        return list(names) if named else list(dict.fromkeys(path.rpartition(".")[2] for path in paths))

    def trained_copies(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield path, name and tensor of each trained copy of a base tensor."""
        for path, group in self.tensors.items():
            yield from ((path, name, group[name]) for name in COPIES if name in group)

    def variant_at(self, path: str, base: Mapping[str, Tensor]) -> LoRA | None:
        """Return its module on the linear at this path, given the base's tensors by name; None if it has none there."""
        if path not in self.targets():
            return None
        W, variant = base[f"{path}.weight"], VARIANTS[self.config.variant]
        with torch.random.fork_rng(devices=[]), W.device:
            module = variant(W.shape, self.config, path, self.make_shared(base))
        module.load_adapter_state({name: t for name, t in self.tensors[path].items() if name not in COPIES})
        return module

    def make_shared(self, base: Mapping[str, Tensor]) -> nn.Module | None:
        """Make the tensors again that all its layers share on this base; None for a variant without any."""
        shapes = [base[f"{path}.weight"].shape for path in self.targets()]
        return VARIANTS[self.config.variant].make_shared(self.config, shapes)

    @property
    def sha256(self) -> str:
        """The fingerprint of all its tensors."""
        return fingerprint(self.named_tensors())

    def attach_to(self, model: nn.Module, name: str = "default", base_sha256: str = "") -> None:
        """Attach this adapter to a model with its base's weights, and make it the active one. base_sha256: the
        fingerprint of the model's base, if it is known already.

        Raises UserError that names every mismatch, the base included, before the model changes.
        """
        modules = self.new_modules(model)
        if problems := self.mismatches(model, modules, base_sha256):
            raise UserError(f"the adapter does not fit this model: {join_problems(problems)}")
        with torch.no_grad():
            for path, module in modules.items():
                for key, p in module.named_parameters():
                    p.copy_(self.tensors[path][key])
        install(model, modules, name)

    def new_modules(self, model: nn.Module) -> dict[str, AdapterModule]:
        """Create its modules on a model, with fresh tensors. Raises UsageError as `lora.attach.new_modules` does."""
        config, layers = self.config, adaptable_layers(model).values()
        if not any(name == "bias" for _, name, _ in self.trained_copies()) and not any(
            getattr(layer, "bias", None) is not None for layer in layers
        ):
            config = replace(config, bias="none")  # PEFT takes bias=all for a model without biases too
        with torch.random.fork_rng(devices=[]):  # the fresh tensors are drawn only to be overwritten
            return new_modules(model, config)

    def problems(self, model: nn.Module, base_sha256: str = "") -> list[str]:
        """Return a message for each mismatch with the model, targets that match nothing included."""
        try:
            return self.mismatches(model, self.new_modules(model), base_sha256)
        except UsageError as error:
            return [*self.base_mismatch(model, base_sha256), str(error)]

    def mismatches(self, model: nn.Module, modules: dict[str, AdapterModule], base_sha256: str) -> list[str]:
        """Return a message for each mismatch with the model and with these fresh modules."""
        wanted = {f"{path}.{key}": p for path, module in modules.items() for key, p in module.named_parameters()}
        here = self.named_tensors()
        problems = self.base_mismatch(model, base_sha256) + self.shared_mismatch(modules) + differences(wanted, here)
        infinite = (key for key in sorted(wanted.keys() & here.keys()) if not here[key].isfinite().all())
        return problems + [f"{key} has values that are not finite" for key in infinite]

    def base_mismatch(self, model: nn.Module, base_sha256: str) -> list[str]:
        weights = base_tensors(model)
        base = base_sha256 or fingerprint(weights)
        if self.metadata.get("base_sha256", base) == base:
            repeated = ((path, W, weights.get(f"{path}.weight")) for path, W in self.of_base.items())
            other = [path for path, W, own in repeated if own is None or not torch.equal(W.to(own), own)]
            return [f"the weight of {path} in its file is not the base's" for path in other]
        trained_on = self.metadata.get("base", "another base")
        return [f"it was trained on {trained_on} with weights {self.metadata['base_sha256'][:12]}, not {base[:12]}"]

    def shared_mismatch(self, modules: Mapping[str, AdapterModule]) -> list[str]:
        own = shared_metadata(modules.values()).get(SHARED)
        if own is None or self.metadata.get(SHARED, own) == own:
            return []
        made = f"those that seed {self.config.seed} makes here are {own[:12]}"
        return [f"its shared projections are {self.metadata[SHARED][:12]}, and {made}: other sizes, or another torch"]


def shared_metadata(modules: Iterable[AdapterModule]) -> dict[str, str]:
    """Return the metadata with the fingerprint of the tensors that these modules share; empty if there are none."""
    module = next((module.shared for module in modules if isinstance(module, LoRA)), None)
    return {} if module is None else {SHARED: fingerprint(dict(module.named_buffers()))}
