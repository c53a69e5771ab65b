"""An adapter as a value: its config and its tensors, off any model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora.attach import base_tensors, check_attached, hosts, install, make_entries
from lora.variants import VARIANTS, AdapterTensors, LoRA, LoRAConfig
from runtime.checkpoint import fingerprint
from runtime.errors import UsageError, UserError


@dataclass(frozen=True)
class Adapter:
    """tensors: {module path: {tensor name: tensor}}, where A is (rank, in), B (out, rank), and `weight` and `bias`
    are trained copies of the base's. facts: what else is known of it, `base_sha256` above all."""

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
            path: {key: p.detach().cpu().clone() for key, p in entry.named_parameters()}
            for path, entry in entries.items()
        }
        return cls(next(iter(entries.values())).config, tensors, facts)

    def targets(self) -> list[str]:
        """The paths of the linears that it changes."""
        return [path for path, group in self.tensors.items() if not group.keys() <= {"weight", "bias"}]

    def copies(self) -> Iterator[tuple[str, str, Tensor]]:
        """Path, name and tensor of each base tensor that it has a trained copy of."""
        for path, group in self.tensors.items():
            yield from ((path, name, group[name]) for name in ("weight", "bias") if name in group)

    def variant_at(self, path: str, W: Tensor) -> LoRA | None:
        """Its variant on the linear at this path, whose weight W is (out, in); None where it has none."""
        if path not in self.targets():
            return None
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(W, requires_grad=False)
        with torch.random.fork_rng(devices=[]):
            entry = VARIANTS[self.config.variant](linear, self.config, path)
        own = {name: t for name, t in self.tensors[path].items() if name not in ("weight", "bias")}
        entry.load_state_dict(own)
        return entry

    @property
    def sha256(self) -> str:
        """A fingerprint of all its tensors."""
        return fingerprint({f"{path}.{key}": t for path, group in self.tensors.items() for key, t in group.items()})

    def put_on(self, model: nn.Module, name: str = "default") -> None:
        """Attach this adapter to a model that has its base's weights, and activate it.

        Raises UserError that names everything that does not fit, the base included, before the model is touched.
        """
        entries = self.fresh_entries(model)
        if problems := self.mismatches(model, entries):
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

    def problems(self, model: nn.Module) -> list[str]:
        """Every way in which this adapter does not fit the model, targets that match nothing included."""
        try:
            return self.mismatches(model, self.fresh_entries(model))
        except UsageError as error:
            return [*self.wrong_base(model), str(error)]

    def wrong_base(self, model: nn.Module) -> list[str]:
        """What tells that the model's weights are not those that this adapter was trained on."""
        if self.facts.get("base_sha256", base := fingerprint(base_tensors(model))) == base:
            return []
        trained_on = self.facts.get("base", "another base")
        return [f"it was trained on {trained_on} with weights {self.facts['base_sha256'][:12]}, not {base[:12]}"]

    def mismatches(self, model: nn.Module, entries: dict[str, AdapterTensors]) -> list[str]:
        """Every way in which this adapter does not fit the model, in words."""
        wanted = {f"{path}.{key}": p.shape for path, entry in entries.items() for key, p in entry.named_parameters()}
        here = {f"{path}.{key}": t for path, tensors in self.tensors.items() for key, t in tensors.items()}
        problems = self.wrong_base(model)
        problems += [f"{key} is missing" for key in sorted(wanted.keys() - here.keys())]
        problems += [f"{key} is unexpected" for key in sorted(here.keys() - wanted.keys())]
        for key in sorted(wanted.keys() & here.keys()):
            if here[key].shape != wanted[key]:
                problems.append(f"{key} is {tuple(here[key].shape)}, not {tuple(wanted[key])}")
            elif not here[key].isfinite().all():
                problems.append(f"{key} has values that are not finite")
        return problems


def cut_short(problems: Sequence[str], most: int = 8) -> str:
    """Problems in one line, at most so many of them."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return f"{'; '.join(problems[:most])}{more}"
