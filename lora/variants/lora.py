"""LoRA, which is also the interface of a variant, and rsLoRA.

A variant is a module with the tensors of one adapter on one linear. `effective_weight` defines it; `forward` is a fast
path with the same result, which a property test checks. A variant may also have tensors that all layers share, a term
of the loss, a hook after each step, and buffers. No other code asks which variant it has: to add one, write a class and
register it in `registry.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.functional import LowRankLinear, lora_linear
from runtime.storage.tensors import fingerprint


class AdapterModule(nn.Module):
    """One adapter's tensors on one layer: here, trainable copies of the layer's own tensors.

    A copy (of an embedding's weight, or of a bias) has the name of the base's tensor and starts equal to it, in fp32.
    """

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__()
        self.config = config
        self.base_hashes: dict[str, str] = {}  # by name, the fingerprint of the values last taken from the base

    def add_copy(self, name: str, base: Tensor) -> None:
        """Add a trainable copy of the layer's tensor `name`; `sync_with_base` gives it its values."""
        self.register_parameter(name, nn.Parameter(torch.empty_like(base, dtype=torch.float32)))

    def values_from_base(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the initial values of the tensors that start from the base, given the layer's tensors by name."""
        return {name: tensor for name, tensor in base.items() if name in self._parameters}

    @torch.no_grad()
    def sync_with_base(self, base: Mapping[str, Tensor]) -> None:
        """Set the tensors that start from the base to their initial values, unless they have been trained since."""
        for name, tensor in self.values_from_base(base).items():
            own = self.get_parameter(name)
            if name not in self.base_hashes or self.base_hashes[name] == fingerprint({"": own}):
                own.copy_(tensor)
                self.base_hashes[name] = fingerprint({"": own})

    def _apply(self, *args, **kwargs) -> AdapterModule:
        """Move to another device or dtype; a tensor that is untrained still counts as untrained after a cast."""
        before = {name: self.get_parameter(name).detach() for name in self.base_hashes}
        super()._apply(*args, **kwargs)
        for name, old in before.items():
            new = self.get_parameter(name)
            if new.dtype != old.dtype and self.base_hashes[name] == fingerprint({"": old}):
                self.base_hashes[name] = fingerprint({"": new})
        return self

    def copy_of(self, name: str) -> Tensor | None:
        """Return the adapter's copy of the layer's tensor `name`, or None."""
        return self._parameters.get(name)

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the tensors that an adapter file holds of this module, by name."""
        return dict(self._parameters)

    @torch.no_grad()
    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `adapter_state` returned."""
        for name, tensor in state.items():
            self.get_parameter(name).copy_(tensor)


class LoRA(AdapterModule):
    """W' = W + (alpha / rank) B A, with A (rank, in) kaiming-uniform and B (out, rank) zero.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    shapes: its tensors by name. ignored_fields: fields of `LoRAConfig` that it does not use. full_rank: whether W' - W
    has full rank, so that only `effective_weight` gives it. The others are PEFT's: the type, the config flags that tell
    variants of one type apart, and PEFT's names for our fields, tensors and shared tensors.
    """

    shapes: ClassVar[dict[str, tuple]] = {"A": ("rank", "in"), "B": ("out", "rank")}
    ignored_fields: ClassVar[tuple[str, ...]] = ("target_rank",)
    full_rank: ClassVar[bool] = False
    peft_type: ClassVar[str] = "LORA"
    peft_flags: ClassVar[dict[str, Any]] = {"use_rslora": False, "use_dora": False}
    peft_fields: ClassVar[dict[str, str]] = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    peft_names: ClassVar[dict[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight"}
    peft_shared: ClassVar[dict[str, str]] = {}

    # extra_loss(modules) returns a term of the loss (), for this variant's active modules on a model.
    extra_loss: ClassVar[Callable[[list[LoRA]], Tensor] | None] = None
    # after_step(modules, step, steps) runs when step number `step` of `steps` has updated the tensors; their gradients
    # are still there.
    after_step: ClassVar[Callable[[list[LoRA], int, int], None] | None] = None

    def __init__(
        self, shape: tuple[int, int], config: LoRAConfig, path: str = "", shared: nn.Module | None = None
    ) -> None:
        """shape: of W, (out, in). path: the linear's, for its own rank and alpha. shared: from `make_shared`."""
        super().__init__(config)
        self.out_features, self.in_features = shape
        self.rank, self.shared = config.rank_at(path), shared
        self.scale = self.scaling(config.alpha_at(path))
        self.make_tensors()

    def make_tensors(self) -> None:
        """Create the tensors such that W' = W, given those that `values_from_base` sets."""
        self.A = self.parameter(self.rank, self.in_features)
        self.B = self.parameter(self.out_features, self.rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @staticmethod
    def parameter(*shape: int) -> nn.Parameter:
        """Return a trainable tensor of zeros in fp32, on torch's default device."""
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    @classmethod
    def make_shared(cls, config: LoRAConfig, shapes: Iterable[tuple[int, int]]) -> nn.Module | None:
        """Return a module with the frozen tensors that all linears of an adapter share, or None. The linears' weights
        have these shapes. It has non-persistent buffers only: no checkpoint holds them, as they can be made again."""
        return None

    @classmethod
    def problems(cls, config: LoRAConfig) -> list[str]:
        """Return a message for each thing in the config that this variant does not support."""
        ranks = config.rank_pattern
        zeros = not all(ranks.values())
        return [f"rank_pattern={ranks!r}: must give modules whole numbers of at least 1"] if zeros else []

    def scaling(self, alpha: float) -> float:
        """Return the scale of B A."""
        return alpha / self.rank

    def current_rank(self) -> int:
        """Return the rank of what `adapter_state` returns."""
        return self.rank

    @property
    def dropout(self) -> float:
        """The dropout probability on the adapter's input now."""
        return self.config.dropout if self.training else 0.0

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        """Return B (out, rank) and A (rank, in), where scale * B A is the update; differentiable."""
        return self.B, self.A

    def effective_weight(self, W: Tensor) -> Tensor:
        """Return W' for a base weight W (out, in) by the variant's equation; differentiable."""
        B, A = self.low_rank_factors()
        return W + self.scale * (B @ A).to(W.dtype)

    def low_rank_linear(self, W: Tensor, bias: Tensor | None) -> LowRankLinear:
        """Return the tensors that the fast path needs, for a linear with this weight and bias."""
        B, A = self.low_rank_factors()
        return LowRankLinear(W, bias, A, B, self.scale)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W'^T + bias the fast way, for x (..., in) in the compute dtype and a base weight W (out, in)."""
        return lora_linear(x, [self.low_rank_linear(W, bias)], self.dropout)[0]

    def lora_plus_parameters(self) -> list[nn.Parameter]:
        """Return the tensors that LoRA+ gives a higher learning rate: those that start at zero."""
        return [self.B]

    @classmethod
    def special_fields_to_peft(cls, config: LoRAConfig, paths: Iterable[str]) -> dict[str, Any]:
        """Return the fields of PEFT's config that `peft_fields` cannot map. paths: of the linears that are adapted."""
        return {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}

    @classmethod
    def special_fields_from_peft(cls, peft_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `LoRAConfig` for them. Raises TypeError, ValueError or AttributeError where there are
        none."""
        return {name: dict(peft_config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.config.dropout:g}"


class RsLoRA(LoRA):
    """W' = W + (alpha / sqrt(rank)) B A: the scale that keeps the update's size the same at every rank.

    Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.
    """

    peft_flags: ClassVar[dict[str, Any]] = {"use_rslora": True, "use_dora": False}

    def scaling(self, alpha: float) -> float:
        return alpha / math.sqrt(self.rank)
