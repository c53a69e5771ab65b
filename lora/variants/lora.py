"""LoRA and what a variant of it must tell of itself; rsLoRA and DoRA, which change one line of it.

A variant is a module that holds the tensors of one adapter on one linear. It says how they are made (`make`), which
thin matrices or which weight they stand for (`thin`, `effective_weight`: the definition), and how to compute with them
without building that weight (`forward`, the fast path, which a property test binds to the definition). Beyond that it
may have tensors that all layers share, a term of the loss, something to do after each step, and tensors that it keeps
of its own. Nothing else asks which variant it is: a new one is a class, and a line in `registry.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.functional import LowRank, lengths, lora_linear, lora_linear_as_written
from runtime.encoding import fingerprint


class AdapterTensors(nn.Module):
    """One adapter's tensors on one module: here, its own copies of base tensors that train whole.

    A copy (of an embedding's weight, of a bias) starts equal to the base's tensor, in fp32, under the same name.
    """

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__()
        self.config = config
        self.taken: dict[str, str] = {}  # what was taken from the base: a fingerprint of its values, by name

    def add_copy(self, name: str, base: Tensor) -> None:
        """Make room for a trainable copy of the module's tensor `name`, which `follow` then takes."""
        self.register_parameter(name, nn.Parameter(torch.empty_like(base, dtype=torch.float32)))

    def from_base(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What its tensors that start as something of the base start as, given the module's own tensors by name."""
        return {name: tensor for name, tensor in base.items() if name in self._parameters}

    @torch.no_grad()
    def follow(self, base: Mapping[str, Tensor]) -> None:
        """Take anew from the base what is still as it was taken last; what has been trained since stays."""
        for name, tensor in self.from_base(base).items():
            own = self.get_parameter(name)
            if name not in self.taken or self.taken[name] == fingerprint({"": own}):
                own.copy_(tensor)
                self.taken[name] = fingerprint({"": own})

    def _apply(self, *args, **kwargs) -> AdapterTensors:
        """Move to another device or dtype; in a narrower dtype, what was taken is still what was taken."""
        before = {name: self.get_parameter(name).detach() for name in self.taken}
        super()._apply(*args, **kwargs)
        for name, old in before.items():
            if (now := self.get_parameter(name)).dtype != old.dtype and self.taken[name] == fingerprint({"": old}):
                self.taken[name] = fingerprint({"": now})
        return self

    def copy_of(self, name: str) -> Tensor | None:
        """The adapter's own version of the module's tensor `name`, or None where it has none."""
        return self._parameters.get(name)

    def to_save(self) -> dict[str, Tensor]:
        """What of it an adapter's file holds, by name."""
        return dict(self._parameters)

    @torch.no_grad()
    def take_back(self, saved: Mapping[str, Tensor]) -> None:
        """Become what `to_save` gave."""
        for name, tensor in saved.items():
            self.get_parameter(name).copy_(tensor)


class LoRA(AdapterTensors):
    """W' = W + (alpha / rank) B A, with A (rank, in) kaiming-uniform and B (out, rank) zero.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    shapes: its tensors by name. least_rank: the lowest that it can have on a module. unread: fields of a config that
    mean nothing to it. The rest is how PEFT writes it: its type, the config fields that tell variants of one type
    apart, its names for our fields and tensors, and for the tensors that all layers share.
    """

    shapes: ClassVar[dict[str, tuple]] = {"A": ("rank", "in"), "B": ("out", "rank")}
    least_rank: ClassVar[int] = 1
    unread: ClassVar[tuple[str, ...]] = ("target_rank",)
    peft_type: ClassVar[str] = "LORA"
    peft_flags: ClassVar[dict[str, Any]] = {"use_rslora": False, "use_dora": False}
    peft_fields: ClassVar[dict[str, str]] = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    peft_names: ClassVar[dict[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight"}
    peft_shared: ClassVar[dict[str, str]] = {}

    # extra_loss(entries) -> a term of the loss (), of this variant's active entries on a model.
    extra_loss: ClassVar[Callable[[list[LoRA]], Tensor] | None] = None
    # after_step(entries, step, steps), called when step number `step` of `steps` has updated the tensors, whose
    # gradients are still there.
    after_step: ClassVar[Callable[[list[LoRA], int, int], None] | None] = None

    def __init__(
        self, shape: tuple[int, int], config: LoRAConfig, path: str = "", shared: nn.Module | None = None
    ) -> None:
        """shape: of W, (out, in). path: of the linear, for a rank and an alpha of its own."""
        super().__init__(config)
        self.out_features, self.in_features = shape
        self.rank, self.shared = config.rank_at(path), shared
        self.scale = self.scaling(config.alpha_at(path))
        self.make()

    def make(self) -> None:
        """Give it its tensors, such that W' is W once those that `from_base` names have been taken."""
        self.A = self.parameter(self.rank, self.in_features)
        self.B = self.parameter(self.out_features, self.rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @staticmethod
    def parameter(*shape: int) -> nn.Parameter:
        """Zeros in fp32 that train, on torch's default device."""
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    @classmethod
    def share(cls, config: LoRAConfig, shapes: Iterable[tuple[int, int]]) -> nn.Module | None:
        """Frozen tensors for all of an adapter's linears, whose weights have these shapes: a module with buffers that
        no checkpoint holds, since it can be made again; None where there are none."""
        return None

    @classmethod
    def problems(cls, config: LoRAConfig) -> list[str]:
        """What makes no sense for this variant, in words."""
        return []

    def scaling(self, alpha: float) -> float:
        """What B A is multiplied by."""
        return alpha / self.rank

    def rank_left(self) -> int:
        """The rank of what `to_save` gives."""
        return self.rank

    @property
    def dropout(self) -> float:
        """The probability on the adapter's input now."""
        return self.config.dropout if self.training else 0.0

    def thin(self) -> tuple[Tensor, Tensor]:
        """B (out, rank) and A (rank, in), whose product times the scale is added to W; differentiable."""
        return self.B, self.A

    def effective_weight(self, W: Tensor) -> Tensor:
        """W' for a base weight W of shape (out, in): the equation itself, differentiable."""
        B, A = self.thin()
        return W + self.scale * (B @ A).to(W.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """W' - W as a product of two thin matrices, (out, rank) and (rank, in), scale included; None for a variant
        whose change has full rank, which then counts as `effective_weight(W) - W`."""
        B, A = self.thin()
        return self.scale * B.detach().double(), A.detach().double()

    def low_rank(self, W: Tensor, bias: Tensor | None) -> LowRank:
        """The linear with this weight and bias, as this variant makes it."""
        B, A = self.thin()
        return LowRank(W, bias, A, B, self.scale)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """x W'^T + bias for x (..., in) in the compute dtype and a base weight W (out, in), the fast way."""
        part = self.low_rank(W, bias)
        return lora_linear_as_written(x, part, self.dropout) if self.dropout else lora_linear(x, part)

    def fast_parameters(self) -> list[nn.Parameter]:
        """The tensors that LoRA+ lets learn faster: those that start at zero."""
        return [self.B]

    @classmethod
    def ranks_to_peft(cls, config: LoRAConfig, paths: Iterable[str]) -> dict[str, Any]:
        """The ranks and alphas of single modules, of those at these paths, as PEFT's config has them."""
        return {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}

    @classmethod
    def ranks_from_peft(cls, about: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a `LoRAConfig` for them. Raises what a config that is wrong makes it raise."""
        patterns = {name: dict(about.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
        if not all(type(value) in (int, float) for pattern in patterns.values() for value in pattern.values()):
            raise ValueError("only numbers by module name can be read")
        return patterns

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.config.dropout:g}"


class RsLoRA(LoRA):
    """W' = W + (alpha / sqrt(rank)) B A: the scale that keeps the update's size the same at every rank.

    Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.
    """

    peft_flags: ClassVar[dict[str, Any]] = {"use_rslora": True, "use_dora": False}

    def scaling(self, alpha: float) -> float:
        """What B A is multiplied by."""
        return alpha / math.sqrt(self.rank)


class DoRA(LoRA):
    """W' = m V / ||V||, row by row, with V = W + (alpha / rank) B A and a trained magnitude m (out,), at first ||W||.

    No gradient flows through ||V||. Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353,
    where outputs are columns; the detached norm is its section 4.3.
    """

    shapes: ClassVar[dict[str, tuple]] = LoRA.shapes | {"magnitude": ("out",)}
    peft_flags: ClassVar[dict[str, Any]] = {"use_rslora": False, "use_dora": True}
    peft_names: ClassVar[dict[str, str]] = LoRA.peft_names | {"magnitude": "lora_magnitude_vector"}

    def make(self) -> None:
        """Give it its tensors, such that W' is W once the magnitude has been taken from the base."""
        super().make()
        self.magnitude = self.parameter(self.out_features)

    def from_base(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What its tensors that start as something of the base start as: copies, and the lengths of W's rows."""
        return super().from_base(base) | {"magnitude": lengths(base["weight"].float())}

    def effective_weight(self, W: Tensor) -> Tensor:
        """W' for a base weight W of shape (out, in): the equation itself, differentiable."""
        V = super().effective_weight(W)
        return (self.magnitude / lengths(V))[:, None].to(W.dtype) * V

    def factors(self) -> None:
        """None: the rows of W itself are stretched, so the change has full rank."""

    def low_rank(self, W: Tensor, bias: Tensor | None) -> LowRank:
        """The linear with this weight and bias, as this variant makes it."""
        return super().low_rank(W, bias)._replace(magnitude=self.magnitude)
