"""DoRA: LoRA on the direction of each row of the weight, and a trained magnitude for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lora.functional import LowRankLinear, row_norms
from lora.variants.lora import LoRA


class DoRA(LoRA):
    """W' = m V / ||V||, row by row, with V = W + (alpha / rank) B A and a trained magnitude m (out,), at first ||W||.

    No gradient flows through ||V||. Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353,
    where outputs are columns; the detached norm is its section 4.3.
    """

    shapes: ClassVar[dict[str, tuple]] = LoRA.shapes | {"magnitude": ("out",)}
    full_rank: ClassVar[bool] = True
    peft_flags: ClassVar[dict[str, Any]] = {"use_rslora": False, "use_dora": True}
    peft_names: ClassVar[dict[str, str]] = LoRA.peft_names | {"magnitude": "lora_magnitude_vector"}

    def make_tensors(self) -> None:
        super().make_tensors()
        self.magnitude = self.parameter(self.out_features)

    def values_from_base(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().values_from_base(base) | {"magnitude": row_norms(base["weight"].float())}

    def effective_weight(self, W: Tensor) -> Tensor:
        V = super().effective_weight(W)
        return (self.magnitude / row_norms(V))[:, None].to(W.dtype) * V

    def low_rank_linear(self, W: Tensor, bias: Tensor | None) -> LowRankLinear:
        return super().low_rank_linear(W, bias)._replace(magnitude=self.magnitude)
