"""The config of an adapter: the fields that all variants have in common, and their validation."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import UsageError


@dataclass(frozen=True)
class LoRAConfig:
    """The config of an adapter.

    rank, alpha: the rank of the update, and the numerator of its scale. dropout: probability on the adapter's input in
    training. targets: a preset of the model's `lora_presets`, module names separated by commas, or `re:` and a regular
    expression for whole module paths. variant: a name in `VARIANTS` (`lora/variants/registry.py`); it may refuse some
    fields. bias: which biases train, `none`, `all` or `lora_only`. rank_pattern, alpha_pattern: other ranks and alphas
    by module, as in PEFT: a key is a regular expression for the end of a module's path. target_rank: AdaLoRA's average
    rank at the end, or None. seed: of the tensors that all layers share, in VeRA.

    Raises UsageError that names every field with an invalid value.
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
            f"lora_rank={self.rank!r}: must be a whole number of at least 1": _is_rank(self.rank) and self.rank,
            f"lora_alpha={self.alpha!r}: must be a number above 0": _is_alpha(self.alpha),
            f"rank_pattern={ranks!r}: must give modules whole numbers of at least 0": _is_pattern(ranks, _is_rank),
            f"alpha_pattern={alphas!r}: must give modules numbers above 0": _is_pattern(alphas, _is_alpha),
            f"lora_dropout={self.dropout!r}: must be at least 0 and below 1": 0 <= self.dropout < 1,
            f"lora_bias={self.bias!r}: must be one of none, all, lora_only": self.bias in ("none", "all", "lora_only"),
            f"seed={self.seed!r}: must be a whole number of at most 64 bits": type(self.seed) is int
            and -(2**63) <= self.seed < 2**63,
        }
        if broken := [message for message, holds in rules.items() if not holds]:
            raise UsageError("; ".join(broken))

    def rank_at(self, path: str) -> int:
        """Return the rank on the module at this path."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def alpha_at(self, path: str) -> float:
        """Return the alpha on the module at this path."""
        return _by_pattern(self.alpha_pattern, path, self.alpha)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _is_pattern(pattern: Any, allowed: Callable[[Any], bool]) -> bool:
    try:
        return all(re.compile(key) and allowed(value) for key, value in pattern.items())
    except (AttributeError, TypeError, re.error, RecursionError, OverflowError):
        return False


def _by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of a path, from a dot on: PEFT's rule."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
