"""What a transformer is made of: the sizes, and which kind of each part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_type_hints

from runtime.errors import UserError

CHOICES = {"norm": ("layer", "rms"), "positions": ("learned", "rotary"), "mlp": ("gelu", "gelu_tanh", "gated_silu")}
OLD_NAMES = {"block_size": "max_positions"}  # in files of earlier versions
ROPE_SCALINGS = {  # the numbers that each kind of `rope_scaling` has beside its `rope_type`
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """What must be equal for weights to fit and to mean the same.

    n_kv_head: heads of keys and values, None for n_head. head_dim: width of a head, None for n_embd / n_head.
    n_inner: width inside the MLP, None for 4 n_embd. max_positions: the longest context. norm: `layer` or `rms`, with
    norm_eps.
    positions: `learned` or `rotary`, with rope_theta and rope_scaling (`rope_type` and its numbers, as Hugging Face's
    config.json has them; None for none). mlp: `gelu` (exact), `gelu_tanh` or `gated_silu`. bias: whether linears and
    norms have biases; qkv_bias, output_bias (of attention), mlp_bias, norm_bias and head_bias, None as `bias` says.
    fused_qkv: queries, keys and values are one linear. qk_norm: RMS norm of each head's queries and keys. tied_head:
    whether the head's weight is the token embedding.

    Raises ValueError for a value that makes no sense, by name.
    """

    vocab_size: int
    n_embd: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None
    head_dim: int | None = None
    n_inner: int | None = None
    max_positions: int = 128
    norm: str = "layer"
    norm_eps: float = 1e-5
    positions: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: Mapping | None = None
    mlp: str = "gelu"
    bias: bool = False
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_bias: bool | None = None
    head_bias: bool | None = None
    fused_qkv: bool = False
    qk_norm: bool = False
    tied_head: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            whole = hint is float and type(value) is int  # as JSON may have it
            if not (whole or isinstance(value, hint)) or (isinstance(value, bool) and "bool" not in str(hint)):
                raise ValueError(f"{name}={value!r}: must be {hint if '|' in str(hint) else hint.__name__}")
            if type(value) in (int, float) and not 0 < value < 2**53:
                raise ValueError(f"{name}={value!r}: must be above 0")
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(CHOICES[name])}")
        for name, divisor in (("n_embd", 1 if self.head_dim else self.n_head), ("n_head", self.n_kv_head or 1)):
            if getattr(self, name) % divisor:
                of = "n_head" if name == "n_embd" else "n_kv_head"
                raise ValueError(f"{name}={getattr(self, name)} is not a multiple of {of}={divisor}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"head_dim={self.head_width}: rotary positions need an even number")
        if self.tied_head and self.has_bias("head"):
            raise ValueError("tied_head: a tied head has no bias, so head_bias must be False")
        self._check_rope_scaling()

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("rope_type")
        if kind not in ROPE_SCALINGS:
            raise ValueError(f"rope_scaling: rope_type={kind!r} must be one of {', '.join(ROPE_SCALINGS)}")
        numbers = {name: value for name, value in self.rope_scaling.items() if name != "rope_type"}
        if numbers.keys() != set(ROPE_SCALINGS[kind]):
            raise ValueError(f"rope_scaling={dict(self.rope_scaling)!r}: {kind} has {', '.join(ROPE_SCALINGS[kind])}")
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < 2**53:
                raise ValueError(f"rope_scaling: {name}={value!r} must be a number above 0")

    @property
    def kv_heads(self) -> int:
        """How many heads keys and values have."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """The width inside the MLP."""
        return self.n_inner or 4 * self.n_embd

    def has_bias(self, part: str) -> bool:
        """Whether a part, one of qkv, output, mlp, norm and head, has biases."""
        own = getattr(self, f"{part}_bias")
        return self.bias if own is None else own

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `as_dict` wrote, here or in an earlier version; fields that are missing take their defaults.

        Raises UserError for fields that only a later version has, ValueError or TypeError for what makes no sense.
        """
        for old, name in OLD_NAMES.items():
            if old in values and name in values:
                raise ValueError(f"{old} and {name} are both there, and mean the same")
        values = {OLD_NAMES.get(name, name): value for name, value in values.items()}
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise UserError(f"this version does not know {', '.join(map(repr, unknown))}; a newer one wrote it")
        return cls(**values)
