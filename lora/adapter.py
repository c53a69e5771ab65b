"""An adapter as a value: its config and its tensors, off any model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora.attach import base_tensors, check_attached, hosts, install, make_entries
from lora.variants import AdapterTensors, LoRAConfig
from runtime.checkpoint import fingerprint
from runtime.errors import UserError


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

    def put_on(self, model: nn.Module, name: str = "default") -> None:
        """Attach this adapter to a model that has its base's weights, and activate it.

        Raises UserError that names everything that does not fit, the base included, before the model is touched.
        """
        with torch.random.fork_rng(devices=[]):  # fresh tensors are drawn only to be overwritten
            entries = make_entries(model, self.config)
        if problems := self.mismatches(model, entries):
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise UserError(f"the adapter does not fit this model: {'; '.join(problems[:8])}{more}")
        with torch.no_grad():
            for path, entry in entries.items():
                for key, p in entry.named_parameters():
                    p.copy_(self.tensors[path][key])
        install(model, entries, name)

    def mismatches(self, model: nn.Module, entries: dict[str, AdapterTensors]) -> list[str]:
        """Every way in which this adapter does not fit the model, in words."""
        wanted = {f"{path}.{key}": p.shape for path, entry in entries.items() for key, p in entry.named_parameters()}
        here = {f"{path}.{key}": t for path, tensors in self.tensors.items() for key, t in tensors.items()}
        problems = []
        if self.facts.get("base_sha256", base := fingerprint(base_tensors(model))) != base:
            trained_on = self.facts.get("base", "another base")
            problems.append(
                f"it was trained on {trained_on} with weights {self.facts['base_sha256'][:12]}, not {base[:12]}"
            )
        problems += [f"{key} is missing" for key in sorted(wanted.keys() - here.keys())]
        problems += [f"{key} is unexpected" for key in sorted(here.keys() - wanted.keys())]
        for key in sorted(wanted.keys() & here.keys()):
            if here[key].shape != wanted[key]:
                problems.append(f"{key} is {tuple(here[key].shape)}, not {tuple(wanted[key])}")
            elif not here[key].isfinite().all():
                problems.append(f"{key} has values that are not finite")
        return problems
