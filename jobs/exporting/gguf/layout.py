"""A model as llama.cpp has it: what it calls its kind and its tensors, and in which order it keeps rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from jobs.exporting.hugging_face.translated import translated
from models.pretrained.families import FAMILIES, Family
from models.transformer import Transformer
from runtime.errors import UserError

GELU = "llama.cpp computes the tanh form of GELU and reads it from a table in half precision: f32 is not exact either"


@dataclass(frozen=True)
class Layout:
    """model: with the parts of its family's. arch: llama.cpp's name of its kind."""

    model: Transformer
    arch: str

    @classmethod
    def of(cls, model: Transformer, family: Family | None) -> Layout:
        """family: the model's, or None for one of ours. Raises UserError where llama.cpp has none like it."""
        kind = next((name for name, known in FAMILIES.items() if known is family), None)
        if not kind or (kind == "starcoder2" and not model.config.bias):  # whose biases llama.cpp wants, be they zeros
            made, values = translated(model, None)
            return cls(made, values["model_type"])
        if kind == "qwen3" and model.config.has_bias("qkv"):
            raise UserError("llama.cpp's qwen3 has no biases in attention, so this model is not exported to it")
        return cls(model, "llama" if kind == "mistral" else kind)

    @property
    def limit(self) -> float:
        """How far llama.cpp's logits may be off where no weight is rounded, as a share of the largest."""
        return 2e-2 if self.model.config.norm == "layer" else 1e-4

    @property
    def notes(self) -> list[str]:
        """What llama.cpp computes otherwise, in words."""
        return [GELU] if self.model.config.norm == "layer" else []

    @cached_property
    def _names(self) -> Any:
        import gguf

        return gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, self.arch.upper()), self.model.config.n_layer)

    def name(self, path: str, leaf: str = "weight") -> str:
        """llama.cpp's name of a tensor of the module at our path."""
        return self._names.get_name(f"{FAMILIES[self.arch].theirs(path)}.{leaf}", (".weight", ".bias"))

    def rows(self, path: str, W: Tensor) -> Tensor:
        """The weight or bias of the module at our path, or the B of an adapter there, with its rows in llama.cpp's
        order: its `llama` rotates neighbours, all others halves."""
        last, config = path.rpartition(".")[2], self.model.config
        if self.arch != "llama" or last not in ("q_proj", "k_proj"):
            return W
        heads = config.n_head if last == "q_proj" else config.kv_heads
        return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(W.shape)
