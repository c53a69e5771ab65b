"""The small GPT of this repository, made from its sizes rather than from a config."""

from __future__ import annotations

import torch

from lora.attach import attach
from lora.config import LoRAConfig
from models.config import ModelConfig
from models.transformer import Transformer


class BigramLanguageModelLoRA(Transformer):
    """A small GPT whose attention, MLP and head are LoRA-capable linears.

    vocab_size, n_embd, block_size, n_head, n_layer, bias: the shape. positions: "learned", or "rotary" as in the bases
    that training.py makes. dropout: probability on embeddings, attention weights and both branches of a block. device:
    where the weights are made. use_lora: attach a fresh adapter named `default`; trained weights of a base may be
    loaded under it, with `load_state_dict(base, strict=False)`, as long as it is untrained. lora_*: see
    `lora.config.LoRAConfig`; lora_presets, lora_embeddings: what lora_targets may name together, and what
    lora_train_embeddings trains copies of.

    Raises ValueError where n_embd is not a multiple of n_head or positions are of neither kind, UsageError for LoRA
    settings that make no sense.
    """

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 256,
        block_size: int = 128,
        device: str | torch.device = "cpu",
        dropout: float = 0.0,
        n_head: int = 4,
        n_layer: int = 4,
        bias: bool = False,
        use_lora: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_targets: str = "all",
        lora_variant: str = "lora",
        lora_bias: str = "none",
        lora_train_embeddings: bool = True,
        positions: str = "learned",
    ) -> None:
        config = ModelConfig(
            vocab_size, n_embd, n_layer, n_head, max_positions=block_size, bias=bias, positions=positions
        )
        super().__init__(config, dropout, device)
        if use_lora:
            attach(
                self,
                LoRAConfig(
                    lora_rank, lora_alpha, lora_dropout, lora_targets, lora_variant, lora_bias, lora_train_embeddings
                ),
            )
