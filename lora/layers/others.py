"""Embeddings and norms with adapters: their own trained copies of weights and biases."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lora.functional import at_least_fp32
from lora.layers.adaptable import Adaptable


class LoRAEmbedding(Adaptable, nn.Embedding):
    """An `nn.Embedding` whose adapters have their own trained copy of it."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where there is nothing to draw, and torch imports 800 modules to draw it
            super().reset_parameters()

    def forward(self, idx: Tensor) -> Tensor:
        """Map token ids of any shape to (*shape, embedding_dim)."""
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        if self.mix and (changes := self.mixed_changes("weight")) is not None:
            idx = idx.expand(self.mix.count, -1)  # positions may be the same for all rows
            own = at_least_fp32(F.embedding(idx, self.weight, *options))
            return self.mix.add_changes(own, changes, idx)
        return F.embedding(idx, self.effective("weight"), *options)


class LoRALayerNorm(Adaptable, nn.LayerNorm):
    """An `nn.LayerNorm` whose adapters may have their own trained bias (`LORA_BIAS=all`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim) in its own dtype; the shape stays."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.effective("bias").to(x.dtype)
        y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        if self.mix and (changes := self.mixed_changes("bias")) is not None:
            y = self.mix.add_changes(y, changes)
        return y
