"""The norms of the stream, and of the heads' queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora.functional import at_least_fp32
from lora.layers.others import LoRALayerNorm
from models.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square, times a weight; there is no bias.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, T, ..., dim) in its own dtype; the shape stays."""
        weight = self.weight.to(x.dtype)
        # One position a row, as while generating, is so little that a call of torch's beats several of ours.
        if x.device.type != "cpu" or x.shape[1] == 1 or torch.compiler.is_compiling():
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return DividedByRMS.apply(x, weight, self.eps)


class DividedByRMS(torch.autograd.Function):
    """`F.rms_norm` on the CPU, where torch has no kernel for it or its gradients, and makes them of many operations.

    Gradients are those of a layer norm of which the mean was 0, for which there is a kernel, but for a term by which
    that keeps the mean at 0, which is added back.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide, width = at_least_fp32(x), x.shape[-1]
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        saved, wanted = ctx.saved_tensors, [*ctx.needs_input_grad[:2], False]
        x, weight, scale, g = map(at_least_fp32, (*saved, g))
        backward, mean = torch.ops.aten.native_layer_norm_backward, torch.zeros_like(scale)
        dx, dw, _ = backward(g, x, x.shape[-1:], mean, scale, weight, None, wanted)
        if dx is not None:
            dx.addcmul_((g @ weight)[..., None], scale, value=1 / x.shape[-1])
        return *(None if d is None else d.to(t.dtype) for d, t in zip((dx, dw), saved, strict=False)), None


def make_norm(config: ModelConfig) -> nn.Module:
    """A norm of the stream."""
    if config.norm == "rms":
        return RMSNorm(config.n_embd, config.norm_eps)
    return LoRALayerNorm(config.n_embd, config.norm_eps, bias=config.has_bias("norm"))
