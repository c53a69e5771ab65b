"""Tiny random models of every family and option, made and saved by transformers itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
STARCODER2 = LLAMA | {"bos_token_id": None, "eos_token_id": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 exact gelu, own width": ("GPT2", GPT2 | {"activation_function": "gelu", "n_inner": 40}),
    "gpt2 untied": ("GPT2", GPT2 | {"tie_word_embeddings": False}),
    "starcoder2": ("Starcoder2", STARCODER2),
    "starcoder2 exact gelu, no biases, untied": (
        "Starcoder2",
        STARCODER2 | {"hidden_act": "gelu", "use_bias": False, "tie_word_embeddings": False, "sliding_window": 64},
    ),
    "llama": ("Llama", LLAMA),
    "llama as many heads": ("Llama", LLAMA | {"num_key_value_heads": 4}),
    "llama tied, llama3 rope": ("Llama", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama linear rope": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}},
    ),
    "llama biases, own head_dim": (
        "Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rms_norm_eps": 1e-5},
    ),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None, "head_dim": None}),
    "mistral slides over nothing": ("Mistral", LLAMA | {"sliding_window": 64, "head_dim": 8}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2 tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 12}),
    "qwen3 biases": ("Qwen3", LLAMA | {"head_dim": 16, "attention_bias": True}),
}  # fmt: skip
ONE_OF_EACH = ("gpt2", "starcoder2", "llama", "llama biases, own head_dim", "mistral", "qwen2 tied", "qwen3")


def make(case: str, dtype: torch.dtype = torch.float32, seed: int = 0, noise: float = 0.2) -> nn.Module:
    """transformers' model of a case, with weights that are all large enough to expose a mistake."""
    import transformers

    kind, values = CASES[case]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape)
    return model.to(dtype).eval()


@functools.cache
def tokenizer() -> Any:
    """A real byte-level BPE of 96 tokens, which puts a BOS in front, as Llama's does."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:80]
    trainer = trainers.BpeTrainer(
        vocab_size=96, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    found.train_from_iterator(["the cat and the dog sat on the mat\n" * 20], trainer)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """The model's folder as transformers writes it, with a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder, **options)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **tokens).save_pretrained(folder)
    return folder


def folder_of(case: str, tmp_path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A case's folder."""
    return save(make(case, dtype), tmp_path / "base")
