"""What all layers with adapters have in common.

Without an adapter each layer has the state dict, the random initialisation and the output of its torch parent, so a
base checkpoint is the same with and without LoRA. An adapter's tensors are under `lora.<adapter name>`, and the layer's
own tensors never change through them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.functional import at_least_fp32
from lora.layers.inference import Mix
from lora.variants.lora import AdapterModule
from runtime.errors import UsageError

MERGED, CACHED = "merged", "cached_weights"  # the context managers that lock a layer


def weighted_sum(base: Tensor, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return base + the sum of strength * (tensor - base) over `parts`; one tensor at strength 1 is returned itself."""
    if not parts:
        return base
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return base + sum(strength * (tensor - base) for tensor, strength in parts)


class Adaptable(nn.Module):
    """A mixin that gives a torch layer named adapters, some of them active, each at a strength."""

    lora: nn.ModuleDict
    active: dict[str, float]  # replaced as a whole, never changed in place
    mix: Mix | None = None  # inside `mixing`: takes the place of `active`, for each row of a batch
    locked_by: str = ""  # the context manager that refuses changes now

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lora, self.active = nn.ModuleDict(), {}

    def __getstate__(self) -> dict:
        """Leave the lock and the cache out of pickles and copies."""
        return {key: value for key, value in self.__dict__.items() if key not in ("locked_by", "cache", "mix")}

    def active_modules(self) -> dict[AdapterModule, float]:
        """Return the modules of the active adapters that have one on this layer, each with its strength."""
        return {self.lora[name]: strength for name, strength in self.active.items() if name in self.lora}

    def changes(self, name: str) -> bool:
        """Return whether the active adapters change this layer's tensor `name`."""
        return any(module.copy_of(name) is not None for module in self.active_modules())

    def effective(self, name: str) -> Tensor | None:
        """Return this layer's tensor `name` with the active adapters applied, in its own dtype or theirs, fp32,
        whichever is more precise; where they do not change it, the tensor itself."""
        base = getattr(self, name)
        # no walrus here: its cell variable breaks torch.compile's graph
        copies = [(m.copy_of(name), s) for m, s in self.active_modules().items() if m.copy_of(name) is not None]
        return weighted_sum(base, copies)

    def modules_of_mix(self) -> list[AdapterModule | None]:
        """Return the modules of the mix's adapters on this layer, None for those that have none."""
        own = dict(self.lora.items())
        return [own.get(name) for name in self.mix.names]

    def mixed_changes(self, name: str) -> Tensor | None:
        """Return what each adapter of the mix changes in this layer's tensor `name`, in fp32, (adapters, *shape);
        None where none does."""
        known, key = self.mix.changes, (self, name)
        if key not in known:
            copies = [module and module.copy_of(name) for module in self.modules_of_mix()]
            known[key] = None
            if any(copy is not None for copy in copies):
                base = at_least_fp32(getattr(self, name))
                changes = [torch.zeros_like(base) if copy is None else copy - base for copy in copies]
                known[key] = torch.stack(changes)
        return known[key]

    def base_tensors(self) -> dict[str, Tensor]:
        """Return the layer's own tensors by name, without any adapter."""
        return dict(self.named_parameters(recurse=False))

    def check_unlocked(self) -> None:
        """Raises UsageError inside `merged` and `cached_weights`, where weights and adapters must not change."""
        if self.locked_by:
            block = f"with {self.locked_by}(model):"
            raise UsageError(f"inside `{block}`, weights and adapters cannot be changed; leave that block first")

    def _load_from_state_dict(self, *args) -> None:
        """Load the base's tensors, and sync untrained adapters with them; torch loads the adapters' own afterwards."""
        self.check_unlocked()
        super()._load_from_state_dict(*args)
        for module in self.lora.values():
            module.sync_with_base(self.base_tensors())
