"""Pretrained families: what their `config.json` says as a `ModelConfig`, and what their tensors are called.

A family is a table of names that reads both ways and a function from its config to ours; the transformer knows none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from models.config import ROPE_SCALINGS, ModelConfig
from runtime.errors import UserError
from runtime.storage.quantized import check_config

Values = Mapping[str, Any]  # a config.json

GPT2_NAMES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "blocks.#.norm_1": "transformer.h.#.ln_1",
    "blocks.#.attention.qkv_proj": "transformer.h.#.attn.c_attn",
    "blocks.#.attention.o_proj": "transformer.h.#.attn.c_proj",
    "blocks.#.norm_2": "transformer.h.#.ln_2",
    "blocks.#.mlp.up_proj": "transformer.h.#.mlp.c_fc",
    "blocks.#.mlp.down_proj": "transformer.h.#.mlp.c_proj",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
LLAMA_NAMES = {
    "token_embedding": "model.embed_tokens",
    "blocks.#.norm_1": "model.layers.#.input_layernorm",
    **{f"blocks.#.attention.{name}": f"model.layers.#.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")},
    "blocks.#.attention.o_proj": "model.layers.#.self_attn.o_proj",
    "blocks.#.attention.q_norm": "model.layers.#.self_attn.q_norm",
    "blocks.#.attention.k_norm": "model.layers.#.self_attn.k_norm",
    "blocks.#.norm_2": "model.layers.#.post_attention_layernorm",
    **{f"blocks.#.mlp.{name}": f"model.layers.#.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    "norm": "model.norm",
    "lm_head": "lm_head",
}
LACKED = ("mlp.gate_proj", "attention.q_norm", "attention.k_norm")  # of Llama's and its kin's
STARCODER2_NAMES = {our: their for our, their in LLAMA_NAMES.items() if not our.endswith(LACKED)} | {
    "blocks.#.mlp.up_proj": "model.layers.#.mlp.c_fc",
    "blocks.#.mlp.down_proj": "model.layers.#.mlp.c_proj",
}
BUFFERS = re.compile(
    r"(.*\.)?(h\.\d+\.attn\.(masked_)?bias|rotary_emb\.inv_freq)"
)  # stored by some, and computed with by none

UNSUPPORTED = (  # fields that change what a model computes, and that nothing here implements
    "attn_logit_softcapping", "final_logit_softcapping", "num_experts", "num_local_experts", "n_routed_experts",
    "logit_scale", "residual_multiplier", "embedding_multiplier", "attention_multiplier",
    "auto_map",
)  # fmt: skip


GELUS = {"gelu": "gelu"} | dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")


def _problem(name: str, value: Any, why: str) -> str:
    return f"{name}={value!r} {why}"


@dataclass(frozen=True)
class Family:
    """names: module paths, ours to theirs, with # for the number of a block. transposed: the last parts of our paths
    whose weights they store as (in, out). config: their config.json to ours; it raises ValueError for what is wrong."""

    names: Mapping[str, str]
    config: Callable[[Values], ModelConfig]
    transposed: frozenset[str] = frozenset()

    def theirs(self, path: str) -> str:
        """Their name of the module at our path. Raises KeyError where they have none."""
        return _renamed(path, self.names)

    def ours(self, path: str) -> str:
        """Our path of their module, whose name may lack the first part. Raises KeyError where we have none."""
        names = {their: our for our, their in self.names.items()}
        prefix = next(iter(names)).partition(".")[0]
        try:
            return _renamed(path, names)
        except KeyError:
            return _renamed(f"{prefix}.{path}", names)

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Names of linears as people know them from this family, where they are not ours, and what they stand for."""
        found: dict[str, tuple[str, ...]] = {}
        for our, their in self.names.items():
            parts, ours = their.split("."), our.split(".")
            for length in (1, 2):
                name, own = ".".join(parts[-length:]), ".".join(ours[-2:] if length > 1 else ours[-1:])
                if "#" in our and parts[-1] != ours[-1]:
                    found[name] = (*found.get(name, ()), own)
        return found

    def is_transposed(self, path: str) -> bool:
        """Whether they store the weight of the linear at our path as (in, out)."""
        return path.rpartition(".")[2] in self.transposed


def _renamed(path: str, names: Mapping[str, str]) -> str:
    number = re.search(r"(?<=\.)\d+(?=\.)", path)
    name = names[re.sub(r"(?<=\.)\d+(?=\.)", "#", path, count=1)]
    return name.replace("#", number[0]) if number else name


def _gpt2(values: Values) -> ModelConfig:
    wrong = [
        _problem(name, values[name], "changes what attention computes, which is not supported")
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention")
        if values.get(name)
    ]
    if not values.get("scale_attn_weights", True):
        wrong.append(_problem("scale_attn_weights", False, "is not supported"))
    activation = values.get("activation_function", "gelu_new")
    _refuse(wrong + _no_gelu("activation_function", activation))
    return ModelConfig(
        vocab_size=values.get("vocab_size", 50257),
        n_embd=values.get("n_embd", 768),
        n_layer=values.get("n_layer", 12),
        n_head=values.get("n_head", 12),
        n_inner=values.get("n_inner"),
        max_positions=values.get("n_positions", 1024),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        mlp=GELUS[activation],
        bias=True,
        head_bias=False,
        fused_qkv=True,
        tied_head=values.get("tie_word_embeddings", True),
    )


def _no_gelu(name: str, activation: Any) -> list[str]:
    return [] if activation in GELUS else [_problem(name, activation, f"is not supported; {', '.join(GELUS)} are")]


def _rope(values: Values) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling as `ModelConfig` has them, from either form of a config.json."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    nested = [name for name, value in (new | old).items() if isinstance(value, dict)]
    _refuse(
        [_problem("rope_parameters", nested, "are rope parameters by layer, which is not supported")] * bool(nested)
    )
    if old and new and (differing := [name for name in old if name in new and new[name] != old[name]]):
        raise ValueError(f"rope_parameters and rope_scaling differ in {', '.join(differing)}")
    rope = new | old
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(_problem("partial_rotary_factor", partial, "is not supported; only 1 is"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_SCALINGS:
        raise ValueError(_problem("rope_type", kind, f"is not supported; default, {', '.join(ROPE_SCALINGS)} are"))
    numbers = {"original_max_position_embeddings": values.get("max_position_embeddings")} | rope
    missing = [name for name in ROPE_SCALINGS[kind] if numbers.get(name) is None]
    _refuse([f"rope_type={kind!r} needs {', '.join(missing)}"] * bool(missing))
    return theta, {"rope_type": kind} | {name: numbers[name] for name in ROPE_SCALINGS[kind]}


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def _unsupported(values: Values) -> list[str]:
    """What is wrong with fields that any family might have."""
    wrong = [_problem(name, values[name], "is not supported") for name in UNSUPPORTED if values.get(name)]
    return wrong + ["vocab_size is missing"] * ("vocab_size" not in values)


def _starcoder2(values: Values) -> ModelConfig:
    """GPT-2's norms and MLP with rotary positions, as StarCoder 2 has them."""
    wrong, activation = _unsupported(values), values.get("hidden_act", "gelu_pytorch_tanh")
    _refuse(wrong + _no_gelu("hidden_act", activation))
    theta, scaling = _rope(values)
    context, heads = values.get("max_position_embeddings", 4096), values.get("num_attention_heads", 24)
    return ModelConfig(
        vocab_size=values["vocab_size"],
        n_embd=values.get("hidden_size", 3072),
        n_layer=values.get("num_hidden_layers", 30),
        n_head=heads,
        n_kv_head=values.get("num_key_value_heads", 2) or heads,
        head_dim=values.get("head_dim"),
        n_inner=values.get("intermediate_size", 12288),
        max_positions=min(context, values.get("sliding_window") or context),  # within which it slides over nothing
        norm_eps=values.get("norm_epsilon", 1e-5),
        positions="rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        mlp=GELUS[activation],
        bias=values.get("use_bias", True),
        norm_bias=True,
        head_bias=False,
        tied_head=values.get("tie_word_embeddings", True),
    )


@dataclass(frozen=True)
class LlamaLike:
    """How a member of Llama's family differs from the others: what its fields are where config.json lacks them.

    kv_heads: None for as many as there are heads. head_dim: None for hidden_size / heads. attention_bias: whether the
    field of that name counts; qkv_bias: whether q, k and v always have one. windowed: whether attention slides where
    no field says otherwise; None if it never does.
    """

    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windowed: bool | None = None

    def max_positions(self, values: Values) -> int:
        """The longest context; no longer than a sliding window, within which it slides over nothing."""
        context = values.get("max_position_embeddings", self.context)
        slides = self.windowed is not None and values.get("use_sliding_window", self.windowed)
        window = values.get("sliding_window", 4096) if slides else None
        return context if window is None else min(context, window)

    def __call__(self, values: Values) -> ModelConfig:
        wrong = _unsupported(values)
        if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
            wrong.append(_problem("hidden_act", activation, "is not supported; silu is"))
        _refuse(wrong)
        theta, scaling = _rope(values)
        heads = values.get("num_attention_heads", 32)
        attention_bias = self.attention_bias and values.get("attention_bias", False)
        return ModelConfig(
            vocab_size=values["vocab_size"],
            n_embd=values.get("hidden_size", 4096),
            n_layer=values.get("num_hidden_layers", 32),
            n_head=heads,
            n_kv_head=values.get("num_key_value_heads", self.kv_heads) or heads,
            head_dim=values.get("head_dim", self.head_dim),
            n_inner=values.get("intermediate_size", 11008),
            max_positions=self.max_positions(values),
            norm="rms",
            norm_eps=values.get("rms_norm_eps", 1e-6),
            positions="rotary",
            rope_theta=theta,
            rope_scaling=scaling,
            mlp="gated_silu",
            bias=False,
            qkv_bias=self.qkv_bias or attention_bias,
            output_bias=attention_bias,
            mlp_bias=self.mlp_bias and values.get("mlp_bias", False),
            qk_norm=self.qk_norm,
            tied_head=values.get("tie_word_embeddings", False),
        )


FAMILIES = {
    "gpt2": Family(GPT2_NAMES, _gpt2, frozenset({"qkv_proj", "o_proj", "up_proj", "down_proj"})),
    "llama": Family(LLAMA_NAMES, LlamaLike(2048, attention_bias=True, mlp_bias=True)),
    "mistral": Family(LLAMA_NAMES, LlamaLike(131072, kv_heads=8, windowed=True)),
    "qwen2": Family(LLAMA_NAMES, LlamaLike(32768, kv_heads=32, qkv_bias=True, windowed=False)),
    "qwen3": Family(
        LLAMA_NAMES,
        LlamaLike(32768, kv_heads=32, head_dim=128, attention_bias=True, qk_norm=True, windowed=False),
    ),
    "starcoder2": Family(STARCODER2_NAMES, _starcoder2),
}


def family_of(values: Values, where: str) -> Family | None:
    """The family of a config.json; None for one of ours. Raises UserError, naming it, for one that is not known."""
    if "model_type" not in values and "n_embd" in values and "architectures" not in values:
        return None
    if (kind := values.get("model_type")) not in FAMILIES:
        raise UserError(f"{where}: model_type={kind!r} is not supported; {', '.join(FAMILIES)} are")
    return FAMILIES[kind]


def config_of(family: Family, values: Values, where: str) -> ModelConfig:
    """A config.json of a family as ours. Raises UserError that names field and value of what is not supported."""
    try:
        if quantization := values.get("quantization_config"):
            check_config(quantization)
        return family.config(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {error}") from None


def family_with(paths: Iterable[str]) -> Family | None:
    """The family whose modules have all of these names; None where there is none, as for ours."""
    paths = list(paths)
    for family in FAMILIES.values():
        with suppress(KeyError):
            if paths and all(map(family.ours, paths)):
                return family
    return None
