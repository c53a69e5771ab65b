"""VeRA: frozen random matrices that all layers share, and two trained vectors on each layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.variants.lora import LoRA

INITIAL_D = 0.1  # the paper's choice for most of its experiments, and PEFT's


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # the cached tensors serve training too, whoever asked for them first
def _projections(seed: int, rank: int, max_in: int, max_out: int) -> tuple[Tensor, Tensor]:
    """Draw A (rank, in), then B (out, rank), kaiming-uniform, on the CPU as PEFT does, for any device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = (rank, max_in), (max_out, rank)
    A, B = (nn.init.kaiming_uniform_(torch.empty(shape, device="cpu"), generator=generator) for shape in shapes)
    return A, B


class VeRA(LoRA):
    """W' = W + diag(b) B diag(d) A, with A (rank, in) and B (out, rank) random, frozen and shared, b (out,) initially
    zero and d (rank,) initially 0.1. There is no alpha.

    Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454. A layer takes the first
    columns of A and the first rows of B. A seed generates them; files have their SHA-256, exports the matrices too.
    """

    shapes: ClassVar[dict[str, tuple]] = {"b": ("out",), "d": ("rank",)}
    ignored_fields: ClassVar[tuple[str, ...]] = ("alpha", "target_rank")
    peft_type: ClassVar[str] = "VERA"
    peft_flags: ClassVar[dict[str, Any]] = {}
    peft_fields: ClassVar[dict[str, str]] = {"rank": "r", "dropout": "vera_dropout", "seed": "projection_prng_key"}
    peft_names: ClassVar[dict[str, str]] = {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    peft_shared: ClassVar[dict[str, str]] = {"A": "base_model.vera_A", "B": "base_model.vera_B"}

    def make_tensors(self) -> None:
        self.b = self.parameter(self.out_features)
        self.d = self.parameter(self.rank)
        nn.init.constant_(self.d, INITIAL_D)

    @classmethod
    def make_shared(cls, config: LoRAConfig, shapes: Iterable[tuple[int, int]]) -> nn.Module:
        """Return A and B for the largest of these linears."""
        (outs, ins), shared = zip(*shapes, strict=True), nn.Module()
        for name, matrix in zip("AB", _projections(config.seed, config.rank, max(ins), max(outs)), strict=True):
            shared.register_buffer(name, matrix, persistent=False)
        return shared

    @classmethod
    def problems(cls, config: LoRAConfig) -> list[str]:
        given = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
        return [
            f"{name}: vera has one rank for all modules, since they share its matrices, and no alpha" for name in given
        ]

    def scaling(self, alpha: float) -> float:
        return 1.0

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.shared.B[: self.out_features], self.shared.A[:, : self.in_features]
        return self.b[:, None] * B * self.d, A

    def lora_plus_parameters(self) -> list[nn.Parameter]:
        return [self.b]

    @classmethod
    def special_fields_to_peft(cls, config: LoRAConfig, paths: Iterable[str]) -> dict[str, Any]:
        """Return the biases in VeRA's own words; it has no ranks or alphas of single modules."""
        return {"bias": config.bias.replace("lora", "vera")}

    @classmethod
    def special_fields_from_peft(cls, peft_config: Mapping[str, Any]) -> dict[str, Any]:
        return {"bias": str(peft_config.get("bias", "none")).replace("vera", "lora")}
