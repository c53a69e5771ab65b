"""AdamW that keeps its moments in 8 bits, block by block.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from runtime.extras import bitsandbytes
from runtime.training.adamw import PartlyAdamW

BLOCK = 256  # values that share a scale, as in bitsandbytes' own 8-bit optimizers
SMALLEST = 4096  # values of a tensor whose moments are kept in 8 bits, as there
CHUNK = 2**20  # values whose moments are in 32 bits at a time; a multiple of BLOCK
LOST = 2.0**-16  # of a block's largest value: bitsandbytes' table on the CPU has no entry for what is less


class EightBits:
    """Blocks of values from -1, or from 0, to 1, times the scale of each block, with more levels near 0."""

    def __init__(self, signed: bool, device: torch.device) -> None:
        levels = bitsandbytes().create_dynamic_map(signed=signed)
        self.signed, self.zero, self.levels = signed, levels.tolist().index(0), levels.to(device)

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The values (n,) in fp32 that codes (n,) and scales (n / BLOCK, rounded up) stand for."""
        return bitsandbytes().dequantize_blockwise(codes, absmax=scales, code=self.levels, blocksize=BLOCK)

    def write(self, values: Tensor, codes: Tensor, scales: Tensor, kept: Tensor) -> None:
        """Put values (n,) into codes and scales where kept () is 1, and leave those as they are where it is 0."""
        new, about = bitsandbytes().quantize_blockwise(values, code=self.levels, blocksize=BLOCK)
        if self.signed and values.device.type == "cpu":  # its least code is 2e-5 of the scale, for a 0 as well
            lost = values.abs() < LOST * about.absmax.repeat_interleave(BLOCK)[: len(values)]
            new.masked_fill_(lost, self.zero)
        codes.copy_(torch.where(kept.bool(), new, codes))
        scales.copy_(torch.where(kept.bool(), about.absmax, scales))


class AdamW8bit(PartlyAdamW):
    """AdamW, fused, whose moments of tensors of at least SMALLEST values are kept in 8 bits each: 2.03 bytes a weight
    instead of 8.

    Those of CHUNK values at a time are put into fp32, updated by torch's fused AdamW, and quantised again by
    bitsandbytes. Unlike there, what is kept is the root of the second moment. The moment itself has a range twice as
    wide: it may become 0 in 8 bits where the first moment does not, and an element whose gradient is 0 in the next step
    is then divided by almost nothing.

    An update that must be skipped is no update to fused AdamW, and then selects the old codes and scales, on the
    device: it costs reading and writing them once more, in every step.
    """

    devices: ClassVar = ("cpu", "cuda")

    def __init__(self, groups: Iterable[dict], betas: tuple[float, float]) -> None:
        rows = []
        for group in groups:
            for large in (False, True):
                params = [p for p in group["params"] if (p.numel() >= SMALLEST) == large]
                rows += [group | {"params": params, "own": large}] if params else []
        super().__init__(rows, betas)
        device = self.param_groups[0]["params"][0].device
        self.first, self.second = EightBits(True, device), EightBits(False, device)

    def update_own(self, group: dict, kept: Tensor) -> None:
        """Update large tensors."""
        about = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        about |= dict(zip(("beta1", "beta2"), group["betas"], strict=True)) | {"fused": True, "found_inf": 1 - kept}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self._state(p, kept)
            tensors = p.view(-1), p.grad.reshape(-1), state["exp_avg"], state["exp_avg_sq_root"]
            chunks = [tensor.split(CHUNK) for tensor in tensors]
            chunks += [state[f"{key}_scale"].split(CHUNK // BLOCK) for key in ("exp_avg", "exp_avg_sq_root")]
            for weight, gradient, m8, v8, m_scale, v_scale in zip(*chunks, strict=True):
                m, v = self.first.read(m8, m_scale), self.second.read(v8, v_scale).square_()
                adamw([weight], [gradient], [m], [v], [], [state["step"].clone()], **about)
                self.first.write(m, m8, m_scale, kept)
                self.second.write(v.sqrt_(), v8, v_scale, kept)
            state["step"] += kept

    def _state(self, p: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """What is kept of a parameter."""
        state = self.state[p]
        if not state:
            n, blocks = p.numel(), -(-p.numel() // BLOCK)
            state["step"] = torch.zeros_like(kept)
            state |= {key: p.new_zeros(n, dtype=torch.uint8) for key in ("exp_avg", "exp_avg_sq_root")}
            state |= {key: p.new_zeros(blocks) for key in ("exp_avg_scale", "exp_avg_sq_root_scale")}
        return state
