"""What an adapter is made of: the fields that every variant has in common, and what can be said of them alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import UsageError


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is made of.

    rank, alpha: the size of the low-rank matrices and the numerator of their scale. dropout: probability on the
    adapter's input while training. targets: a preset of the model's `lora_presets`, names separated by commas, or `re:`
    and a regular expression for whole module paths. variant: a name in `VARIANTS` (`lora/variants/registry.py`), whose
    `problems` say what makes no sense for it. bias: which biases train, `none`, `all` or `lora_only`. rank_pattern,
    alpha_pattern: other ranks and alphas by module, as PEFT has them: a key is a regular expression for the end of a
    module's path. target_rank: of AdaLoRA, the average rank to end with, or None. seed: of the tensors that all layers
    of an adapter share, in VeRA.

    Raises UsageError for a rank below 1, an alpha not above 0, a dropout outside [0, 1), or another bias.
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
    target_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ranks, alphas = self.rank_pattern, self.alpha_pattern
        rules = {
            f"lora_rank={self.rank!r}: must be a whole number of at least 1": _is_rank(self.rank, 1),
            f"lora_alpha={self.alpha!r}: must be a number above 0": _is_alpha(self.alpha),
            f"rank_pattern={ranks!r}: must give modules whole numbers of at least 0": _is_pattern(
                ranks, lambda rank: _is_rank(rank, 0)
            ),
            f"alpha_pattern={alphas!r}: must give modules numbers above 0": _is_pattern(alphas, _is_alpha),
            f"lora_dropout={self.dropout!r}: must be at least 0 and below 1": 0 <= self.dropout < 1,
            f"lora_bias={self.bias!r}: must be one of none, all, lora_only": self.bias in ("none", "all", "lora_only"),
            f"seed={self.seed!r}: must be a whole number of at most 64 bits": _is_seed(self.seed),
        }
        if broken := [message for message, holds in rules.items() if not holds]:
            raise UsageError("; ".join(broken))

    def rank_at(self, path: str) -> int:
        """The rank on the module at this path."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha on the module at this path."""
        return _by_pattern(self.alpha_pattern, path, self.alpha)


def _is_rank(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _is_seed(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_pattern(pattern: Any, allowed: Callable[[Any], bool]) -> bool:
    try:
        return all(re.compile(key) and allowed(value) for key, value in pattern.items())
    except (AttributeError, TypeError, re.error, RecursionError, OverflowError):
        return False


def _by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches the end of a path, from a dot on; PEFT's own rule."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
