"""The variants by name."""

from __future__ import annotations

from lora.config import LoRAConfig
from lora.variants.adalora import AdaLoRA
from lora.variants.dora import DoRA
from lora.variants.lora import LoRA, RsLoRA
from lora.variants.vera import VeRA
from runtime.errors import UsageError

VARIANTS: dict[str, type[LoRA]] = {"lora": LoRA, "rslora": RsLoRA, "dora": DoRA, "vera": VeRA, "adalora": AdaLoRA}


def variant_of(config: LoRAConfig) -> type[LoRA]:
    """Return the variant of a config. Raises UsageError for an unknown name and for what the variant refuses."""
    if config.variant not in VARIANTS:
        raise UsageError(f"lora_variant={config.variant!r}: must be one of {', '.join(VARIANTS)}")
    variant = VARIANTS[config.variant]
    if problems := variant.problems(config):
        raise UsageError("; ".join(problems))
    return variant
