"""The small models and settings that tests share."""

from __future__ import annotations

import torch

from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}  # settings of a base that trains in no time


def tiny(seed: int = 0, noise: float = 0.2, **changes) -> BigramLanguageModelLoRA:
    """A base whose weights are all large enough to expose a mistake."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "n_embd": 32, "block_size": 16, "n_head": 4, "n_layer": 2}
    model = BigramLanguageModelLoRA(**sizes | changes)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape)
    return model
