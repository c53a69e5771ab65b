"""A model whose parameters lie in pieces on several processes, which put those of a module together while they need it.

By PyTorch's FSDP2 (`fully_shard`); Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277, and Rajbhandari et al. 2020,
"ZeRO", arXiv 1910.02054. A parameter in pieces is a DTensor with the shape of the whole (`pieces.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from runtime.device import give_back_freed_memory


def shard(model: nn.Module, units: Iterable[nn.Module], kept: Iterable[nn.Parameter], device: torch.device) -> None:
    """Cut a model's parameters into pieces, and move it to a device.

    units: modules inside it whose parameters are put together only while they are needed; what is in none of them stays
    together through a step. kept: parameters that are not cut; nobody adds up their gradients.
    """
    if device.type == "cpu":
        give_back_freed_memory()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    kept = set(kept)
    # Logits are a view, which nobody writes into.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, ignored_params=kept, reshard_after_forward=True)
    model.to(device)
