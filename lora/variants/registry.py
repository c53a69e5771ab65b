"""The variants by name, and what makes no sense for one of them."""

from __future__ import annotations

from lora.config import LoRAConfig
from lora.variants.adalora import AdaLoRA
from lora.variants.lora import DoRA, LoRA, RsLoRA
from lora.variants.vera import VeRA
from runtime.errors import UsageError

VARIANTS: dict[str, type[LoRA]] = {"lora": LoRA, "rslora": RsLoRA, "dora": DoRA, "vera": VeRA, "adalora": AdaLoRA}


def checked(config: LoRAConfig) -> type[LoRA]:
    """The variant of a config. Raises UsageError for an unknown name, or what makes no sense for the variant."""
    if config.variant not in VARIANTS:
        raise UsageError(f"lora_variant={config.variant!r}: must be one of {', '.join(VARIANTS)}")
    variant, ranks = VARIANTS[config.variant], config.rank_pattern
    problems = variant.problems(config)
    if any(rank < variant.least_rank for rank in ranks.values()):
        least = variant.least_rank
        problems = [f"rank_pattern={ranks!r}: must give modules whole numbers of at least {least}", *problems]
    if problems:
        raise UsageError("; ".join(problems))
    return variant
