"""AdamW, and AdamW for some of the parameters with something of one's own for the others, under the guard that fused
AdamW has."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor

from runtime.processes.pieces import own

# torch imports its compiler, which takes a second, to keep these out of what is compiled, and so does its `step`.
# Nothing of an optimizer is compiled here. Where a torch does not read this attribute, the import comes back.
for _name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
    _plain = inspect.unwrap(getattr(torch.optim.Optimizer, _name))
    _plain.__dynamo_disable = _plain
_step = inspect.unwrap(torch.optim.Adam.step)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, fused, without an import of torch's compiler."""

    def __init__(self, params: Iterable, **options) -> None:
        super().__init__(params, **options, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        _step(self)


class PartlyAdamW(AdamW):
    """AdamW, fused, but for groups with `own=True`, which `update_own` updates.

    Like a fused optimizer's, an update is skipped on the device where `found_inf` is not 0.
    """

    def __init__(self, groups: Iterable[dict], betas: tuple[float, float]) -> None:
        super().__init__([{"own": False} | group for group in groups], betas=betas)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["own"]]
            super().step()
        finally:
            self.param_groups = groups
        found_inf = getattr(self, "found_inf", None)
        for group in groups:
            if group["own"]:
                self.update_own(group, own(group["params"][0]).new_ones(()) if found_inf is None else 1 - found_inf)

    def update_own(self, group: dict, kept: Tensor) -> None:
        """Update those parameters of a group that have a gradient. kept: 1 () on their device, or 0 where the update is
        skipped."""
        raise NotImplementedError
