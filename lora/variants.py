"""LoRA and its relatives: one equation each.

A variant is a module that holds the tensors of one adapter on one linear. It says how they are made, which weight
they stand for (`effective_weight`, the definition), and how to compute with them without building that weight
(`forward`, the fast path, which a property test binds to the definition). Nothing else asks which variant it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lora.functional import LowRank, lengths, lora_linear, lora_linear_as_written
from runtime.errors import UsageError

if TYPE_CHECKING:
    from lora.layers import LoRALinear


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is made of.

    rank, alpha: the size of the low-rank matrices and the numerator of their scale. dropout: probability on the
    adapter's input while training. targets: `minimal` (q, v), `standard` (q, k, v, o), `all` (and the MLP and the
    head), names separated by commas, or `re:` and a regular expression for whole module paths. bias: which biases
    train, `none`, `all` or `lora_only`. rank_pattern, alpha_pattern: other ranks and alphas by module, as PEFT has
    them: a key is a regular expression for the end of a module's path.

    Raises UsageError for a rank below 1, an alpha not above 0, a dropout outside [0, 1) or an unknown name.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all"
    variant: str = "lora"
    bias: str = "none"
    train_embeddings: bool = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        ranks, alphas = self.rank_pattern, self.alpha_pattern
        rules = {
            f"lora_rank={self.rank!r}: must be a whole number of at least 1": _is_rank(self.rank),
            f"lora_alpha={self.alpha!r}: must be a number above 0": _is_alpha(self.alpha),
            f"rank_pattern={ranks!r}: must give modules whole numbers of at least 1": _is_pattern(ranks, _is_rank),
            f"alpha_pattern={alphas!r}: must give modules numbers above 0": _is_pattern(alphas, _is_alpha),
            f"lora_dropout={self.dropout!r}: must be at least 0 and below 1": 0 <= self.dropout < 1,
            f"lora_variant={self.variant!r}: must be one of {', '.join(VARIANTS)}": self.variant in VARIANTS,
            f"lora_bias={self.bias!r}: must be one of none, all, lora_only": self.bias in ("none", "all", "lora_only"),
        }
        if broken := [message for message, holds in rules.items() if not holds]:
            raise UsageError("; ".join(broken))

    def rank_at(self, path: str) -> int:
        """The rank on the module at this path."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha on the module at this path."""
        return _by_pattern(self.alpha_pattern, path, self.alpha)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _is_pattern(pattern: Any, allowed: Callable[[Any], bool]) -> bool:
    try:
        return all(re.compile(key) and allowed(value) for key, value in pattern.items())
    except (AttributeError, TypeError, re.error, RecursionError, OverflowError):
        return False


def _by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches the end of a path, from a dot on; PEFT's own rule."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


class AdapterTensors(nn.Module):
    """One adapter's tensors on one module: here, its own copies of base tensors that train whole.

    A copy (of an embedding's weight, of a bias) starts equal to the base's tensor, in fp32, under the same name.
    """

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__()
        self.config = config

    def add_copy(self, name: str, base: Tensor) -> None:
        """Take a trainable copy of the module's tensor `name`."""
        self.register_parameter(name, nn.Parameter(base.detach().to(torch.float32, copy=True)))

    def copy_of(self, name: str) -> Tensor | None:
        """The adapter's own version of the module's tensor `name`, or None where it has none."""
        return self._parameters.get(name)


class LoRA(AdapterTensors):
    """W' = W + (alpha / rank) B A, with A (rank, in) kaiming-uniform and B (out, rank) zero.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """

    peft_flags: ClassVar[dict[str, bool]] = {"use_rslora": False, "use_dora": False}

    def __init__(self, linear: nn.Linear, config: LoRAConfig, path: str = "") -> None:
        super().__init__(config)
        self.rank = config.rank_at(path)
        self.scale = self.scaling(config.alpha_at(path), self.rank)
        options = {"device": linear.weight.device, "dtype": torch.float32}
        self.A = nn.Parameter(torch.empty(self.rank, linear.in_features, **options))
        self.B = nn.Parameter(torch.zeros(linear.out_features, self.rank, **options))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @staticmethod
    def scaling(alpha: float, rank: int) -> float:
        """What B A is multiplied by."""
        return alpha / rank

    @property
    def dropout(self) -> float:
        """The probability on the adapter's input now."""
        return self.config.dropout if self.training else 0.0

    def effective_weight(self, W: Tensor) -> Tensor:
        """W' for a base weight W of shape (out, in): the equation itself, differentiable."""
        return W + self.scale * (self.B @ self.A).to(W.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """W' - W as a product of two thin matrices, (out, rank) and (rank, in), scale included; None for a variant
        whose change has full rank, which then counts as `effective_weight(W) - W`."""
        return self.scale * self.B.detach().double(), self.A.detach().double()

    def low_rank(self, W: Tensor, bias: Tensor | None) -> LowRank:
        """The linear with this weight and bias, as this variant makes it."""
        return LowRank(W, bias, self.A, self.B, self.scale)

    def forward(self, x: Tensor, layer: LoRALinear, bias: Tensor | None) -> Tensor:
        """x W'^T + bias for x (..., in) in the compute dtype, the fast way; W is the layer's weight."""
        part = self.low_rank(layer.weight, bias)
        return lora_linear_as_written(x, part, self.dropout) if self.dropout else lora_linear(x, part)

    def fast_parameters(self) -> list[nn.Parameter]:
        """The tensors that LoRA+ lets learn faster: those that start at zero."""
        return [self.B]

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.config.dropout:g}"


class RsLoRA(LoRA):
    """W' = W + (alpha / sqrt(rank)) B A: the scale that keeps the update's size the same at every rank.

    Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.
    """

    peft_flags: ClassVar[dict[str, bool]] = {"use_rslora": True, "use_dora": False}

    @staticmethod
    def scaling(alpha: float, rank: int) -> float:
        """What B A is multiplied by."""
        return alpha / math.sqrt(rank)


class DoRA(LoRA):
    """W' = m V / ||V||, row by row, with V = W + (alpha / rank) B A and a trained magnitude m (out,), at first ||W||.

    No gradient flows through ||V||. Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353,
    where outputs are columns; the detached norm is its section 4.3.
    """

    peft_flags: ClassVar[dict[str, bool]] = {"use_rslora": False, "use_dora": True}

    def __init__(self, linear: nn.Linear, config: LoRAConfig, path: str = "") -> None:
        super().__init__(linear, config, path)
        self.magnitude = nn.Parameter(lengths(linear.weight.float()))

    def effective_weight(self, W: Tensor) -> Tensor:
        """W' for a base weight W of shape (out, in): the equation itself, differentiable."""
        V = super().effective_weight(W)
        return (self.magnitude / lengths(V))[:, None].to(W.dtype) * V

    def factors(self) -> None:
        """None: the rows of W itself are stretched, so the change has full rank."""

    def low_rank(self, W: Tensor, bias: Tensor | None) -> LowRank:
        """The linear with this weight and bias, as this variant makes it."""
        return LowRank(W, bias, self.A, self.B, self.scale, self.magnitude)


VARIANTS: dict[str, type[LoRA]] = {"lora": LoRA, "rslora": RsLoRA, "dora": DoRA}
