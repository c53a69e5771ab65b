"""AdamW whose moments lie in memory that CUDA moves between a GPU and its host, page by page, as there is room.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from runtime.extras import bitsandbytes

SMALLEST = 10**5  # values of a tensor whose moments are paged, as in bitsandbytes' own paged optimizers


class PagedAdamW(torch.optim.AdamW):
    """AdamW, fused, whose moments of tensors of at least SMALLEST values lie in pages from bitsandbytes.

    A GPU whose memory is taken for something else hands pages to its host, and gets them back when the update reads
    them. The update is fused AdamW's, with its guard.
    """

    devices: ClassVar = ("cuda",)

    def __init__(self, groups: Iterable[dict], betas: tuple[float, float]) -> None:
        super().__init__(groups, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if not self.state[p]:
                make = paged_zeros if p.numel() >= SMALLEST else torch.zeros_like
                self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": make(p), "exp_avg_sq": make(p)}
        super().step()


class _Pages:
    """Memory of a GPU and its host, as torch takes it for memory of the GPU."""

    def __init__(self, p: Tensor) -> None:
        self.bytes = bitsandbytes().get_paged(p.nbytes, dtype=torch.uint8, device=p.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.bytes.numel(),), "typestr": "|u1", "data": (self.bytes.data_ptr(), False), "version": 3}


def paged_zeros(p: Tensor) -> Tensor:
    """Zeros like a tensor on a GPU, in pages. They are there until the process ends, as bitsandbytes frees none."""
    return torch.as_tensor(_Pages(p), device=p.device).view(p.dtype).view(p.shape).zero_()
