"""A model of ours as one of a pretrained family: the same function under other names, where that is exact."""

from __future__ import annotations

from typing import Any

import torch

from lora.merge import MergedTensors
from models.config import ModelConfig
from models.pretrained.families import FAMILIES, config_of
from models.transformer import Transformer
from runtime.errors import UserError

PARTS = ("qkv", "output", "mlp", "norm", "head")
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "gated_silu": "silu"}  # ours and theirs
CLASSES = {"gpt2": "GPT2LMHeadModel", "starcoder2": "Starcoder2ForCausalLM", "llama": "LlamaForCausalLM"}


def translated(model: Transformer, eos: int | None) -> tuple[Transformer, dict[str, Any]]:
    """The model with the parts of its family's, and the family's config.json. It is the same model, adapters included,
    where it has these already. eos: the token that ends a text.

    Raises UserError that names everything that the family has no place for.
    """
    config = model.config
    kind = "llama" if config.norm == "rms" else "starcoder2" if config.positions == "rotary" else "gpt2"
    values = {"model_type": kind, "architectures": [CLASSES[kind]], "bos_token_id": eos, "eos_token_id": eos}
    values |= VALUES[kind](config)
    theirs = config_of(FAMILIES[kind], values, f"as a {CLASSES[kind]}")
    ours, wanted = _meaning(config), _meaning(theirs)
    if kind != "llama":  # biases everywhere but in the head: zeros where we have none
        ours |= {f"{part}_bias": True for part in PARTS[:-1]}
    if lost := [f"{name}={ours[name]!r}" for name in ours if ours[name] != wanted[name]]:
        raise UserError(f"a {CLASSES[kind]} has no place for {', '.join(lost)}, so this model cannot be one")
    return (model if kind == "llama" else _rearranged(model, theirs)), values


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.inner_width,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": ACTIVATIONS[config.mlp],
        "tie_word_embeddings": config.tied_head,
    }


def _rotary(config: ModelConfig) -> dict[str, Any]:
    """What Llama's and StarCoder 2's config.json have in common."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.inner_width,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "hidden_act": ACTIVATIONS[config.mlp],
        "tie_word_embeddings": config.tied_head,
    }


def _starcoder2(config: ModelConfig) -> dict[str, Any]:
    return _rotary(config) | {"norm_epsilon": config.norm_eps, "use_bias": True}


def _llama(config: ModelConfig) -> dict[str, Any]:
    return _rotary(config) | {
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.has_bias("qkv"),
        "mlp_bias": config.has_bias("mlp"),
    }


VALUES = {"gpt2": _gpt2, "starcoder2": _starcoder2, "llama": _llama}


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """What a config says, with nothing left to defaults, but for how q, k and v lie."""
    said = config.as_dict() | {
        name: config.has_bias(name.removesuffix("_bias")) for name in map("{}_bias".format, PARTS)
    }
    said |= {"n_kv_head": config.kv_heads, "head_dim": config.head_width, "n_inner": config.inner_width}
    if config.norm == "rms":
        del said["norm_bias"]  # which no RMS norm has
    return {name: value for name, value in said.items() if name not in ("bias", "fused_qkv")}


def _rearranged(model: Transformer, config: ModelConfig) -> Transformer:
    """The same function, adapters merged, in fp32 with the parts of another config: q, k and v joined, zeros for biases
    that are missing."""
    made, own = Transformer(config, device="meta"), MergedTensors(model, torch.float32)
    for name, p in list(made.named_parameters()):
        parts = [own.get(name.replace("qkv_proj", f"{part}_proj")) for part in "qkv"] if "qkv_proj" in name else []
        parts = parts if any(part is not None for part in parts) else [own.get(name)]
        values = torch.zeros(p.shape) if parts[0] is None else torch.cat(parts)
        path, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(path), leaf, torch.nn.Parameter(values, requires_grad=False))
    made.tie_head()
    return made
