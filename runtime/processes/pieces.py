"""Tensors of which each process has a piece (DTensors, which `shards.py` makes), and plain ones alike."""

from __future__ import annotations

import torch
from torch import Tensor


def in_pieces(tensor: Tensor) -> bool:
    """Whether this process has only a piece of it."""
    return hasattr(tensor, "full_tensor")  # asked so, as importing DTensor takes a while


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must ask for it where it is in pieces."""
    return tensor.full_tensor() if in_pieces(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The piece that this process has of a tensor, or all of a plain one; what is written there is in the tensor."""
    return tensor.to_local() if in_pieces(tensor) else tensor


def piece_of(values: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut as another is; nothing travels."""
    if not in_pieces(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.to(like.device)
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None).to_local()


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor the values of a whole one."""
    own(tensor).copy_(piece_of(values, tensor))
