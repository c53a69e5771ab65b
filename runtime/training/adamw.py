"""AdamW for some of the parameters, and something of one's own for the others, under the guard that fused AdamW has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from runtime.processes.pieces import own


class PartlyAdamW(torch.optim.AdamW):
    """AdamW, fused, but for groups with `own=True`, which `update_own` updates.

    Like a fused optimizer's, an update is skipped on the device where `found_inf` is not 0.
    """

    def __init__(self, groups: Iterable[dict], betas: tuple[float, float]) -> None:
        super().__init__([{"own": False} | group for group in groups], betas=betas, fused=True)

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
