"""An adapter as a value: its config and its tensors, off any model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lora.attach import base_tensors, check_attached, hosts, install, make_entries, target_names
from lora.config import LoRAConfig
from lora.variants.lora import AdapterTensors, LoRA
from lora.variants.registry import VARIANTS
from runtime.encoding import differences, fingerprint
from runtime.errors import UsageError, UserError

SHARED = "shared_sha256"  # a fact: the fingerprint of what all layers of an adapter share, and no file need hold


@dataclass(frozen=True)
class Adapter:
    """tensors: {module path: {tensor name: tensor}}, with the variant's own names and shapes, as A (rank, in), and
    `weight` and `bias` for trained copies of the base's. facts: what else is known of it, `base_sha256` above all."""

    config: LoRAConfig
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, name: str = "default", **facts: str) -> Adapter:
        """A copy of an attached adapter, on the CPU, with these facts.

        Raises UsageError for a name that is not attached.
        """
        check_attached(model, name)
        entries = {path: host.lora[name] for path, host in hosts(model).items() if name in host.lora}
        tensors = {
            path: {key: p.detach().cpu().clone() for key, p in entry.to_save().items()}
            for path, entry in entries.items()
        }
        config = next(iter(entries.values())).config
        left = {path: entry.rank_left() for path, entry in entries.items() if isinstance(entry, LoRA)}
        others = {path: rank for path, rank in left.items() if rank != config.rank_at(path)}
        # first, as the first that matches counts, and with their own values where a path was a pattern before
        config = replace(config, rank_pattern=others | dict(config.rank_pattern) | others) if others else config
        return cls(config, tensors, facts | shared_fact(entries.values()))

    def named_tensors(self) -> dict[str, Tensor]:
        """Its tensors as {<module path>.<tensor name>: tensor}."""
        return {f"{path}.{key}": t for path, group in self.tensors.items() for key, t in group.items()}

    def targets(self) -> list[str]:
        """The paths of the linears that it changes."""
        return [path for path, group in self.tensors.items() if not group.keys() <= {"weight", "bias"}]

    def target_modules(self) -> list[str]:
        """The names of the linears that it changes, as its config gives them; for a preset of its model, which is no
        name, what it stood for there."""
        paths, names = self.targets(), target_names(self.config.targets, {})
        named = all(any(f".{path}".endswith(f".{name}") for path in paths) for name in names)
        return list(names) if named else list(dict.fromkeys(path.rpartition(".")[2] for path in paths))

    def copies(self) -> Iterator[tuple[str, str, Tensor]]:
        """Path, name and tensor of each base tensor that it has a trained copy of."""
        for path, group in self.tensors.items():
            yield from ((path, name, group[name]) for name in ("weight", "bias") if name in group)

    def variant_at(self, path: str, base: Mapping[str, Tensor]) -> LoRA | None:
        """Its variant on the linear at this path of a base, given by its tensors' names; None where it has none."""
        if path not in self.targets():
            return None
        W, variant = base[f"{path}.weight"], VARIANTS[self.config.variant]
        with torch.random.fork_rng(devices=[]), W.device:
            entry = variant(W.shape, self.config, path, self.shared(base))
        entry.take_back({name: t for name, t in self.tensors[path].items() if name not in ("weight", "bias")})
        return entry

    def shared(self, base: Mapping[str, Tensor]) -> nn.Module | None:
        """What all its layers share on this base, made again; None for a variant that shares nothing."""
        shapes = [base[f"{path}.weight"].shape for path in self.targets()]
        return VARIANTS[self.config.variant].share(self.config, shapes)

    @property
    def sha256(self) -> str:
        """A fingerprint of all its tensors."""
        return fingerprint(self.named_tensors())

    def put_on(self, model: nn.Module, name: str = "default", base_sha256: str = "") -> None:
        """Attach this adapter to a model that has its base's weights, and activate it. base_sha256: the fingerprint of
        the model's base, where it is known already.

        Raises UserError that names everything that does not fit, the base included, before the model is touched.
        """
        entries = self.fresh_entries(model)
        if problems := self.mismatches(model, entries, base_sha256):
            raise UserError(f"the adapter does not fit this model: {cut_short(problems)}")
        with torch.no_grad():
            for path, entry in entries.items():
                for key, p in entry.named_parameters():
                    p.copy_(self.tensors[path][key])
        install(model, entries, name)

    def fresh_entries(self, model: nn.Module) -> dict[str, AdapterTensors]:
        """Tensors of the shapes that this adapter must have on a model. Raises UsageError as `make_entries` does."""
        with torch.random.fork_rng(devices=[]):  # fresh tensors are drawn only to be overwritten
            return make_entries(model, self.config)

    def problems(self, model: nn.Module, base_sha256: str = "") -> list[str]:
        """Every way in which this adapter does not fit the model, targets that match nothing included."""
        try:
            return self.mismatches(model, self.fresh_entries(model), base_sha256)
        except UsageError as error:
            return [*self.wrong_base(model, base_sha256), str(error)]

    def wrong_base(self, model: nn.Module, base_sha256: str) -> list[str]:
        """What tells that the model's weights are not those that this adapter was trained on."""
        base = base_sha256 or fingerprint(base_tensors(model))
        if self.facts.get("base_sha256", base) == base:
            return []
        trained_on = self.facts.get("base", "another base")
        return [f"it was trained on {trained_on} with weights {self.facts['base_sha256'][:12]}, not {base[:12]}"]

    def wrong_shared(self, entries: Mapping[str, AdapterTensors]) -> list[str]:
        """What tells that the tensors its layers share are not those that it was trained with."""
        own = shared_fact(entries.values()).get(SHARED)
        if own is None or self.facts.get(SHARED, own) == own:
            return []
        made = f"those that seed {self.config.seed} makes here are {own[:12]}"
        return [f"its shared projections are {self.facts[SHARED][:12]}, and {made}: other sizes, or another torch"]

    def mismatches(self, model: nn.Module, entries: dict[str, AdapterTensors], base_sha256: str) -> list[str]:
        """Every way in which this adapter does not fit the model, in words."""
        wanted = {f"{path}.{key}": p for path, entry in entries.items() for key, p in entry.named_parameters()}
        here = self.named_tensors()
        problems = self.wrong_base(model, base_sha256) + self.wrong_shared(entries) + differences(wanted, here)
        infinite = (key for key in sorted(wanted.keys() & here.keys()) if not here[key].isfinite().all())
        return problems + [f"{key} has values that are not finite" for key in infinite]


def shared_fact(entries: Iterable[AdapterTensors]) -> dict[str, str]:
    """The fingerprint of what these tensors share, by the name of the fact; nothing where they share nothing."""
    module = next((entry.shared for entry in entries if isinstance(entry, LoRA)), None)
    return {} if module is None else {SHARED: fingerprint(dict(module.named_buffers()))}


def cut_short(problems: Sequence[str], most: int = 8) -> str:
    """Problems in one line, at most so many of them."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return f"{'; '.join(problems[:most])}{more}"
