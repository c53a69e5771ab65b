"""VeRA: random matrices that all layers share and nobody trains, with two trained vectors for each layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.variants.lora import LoRA

D_AT_FIRST = 0.1  # the paper's choice for most of its experiments, and PEFT's


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept serves training too, whoever asked for it first
def _drawn(seed: int, rank: int, widest_in: int, widest_out: int) -> tuple[Tensor, Tensor]:
    """A (rank, in), then B (out, rank), kaiming-uniform, drawn on the CPU as PEFT draws them, whatever they are for."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = (rank, widest_in), (widest_out, rank)
    A, B = (nn.init.kaiming_uniform_(torch.empty(shape, device="cpu"), generator=generator) for shape in shapes)
    return A, B


class Projections(nn.Module):
    """The matrices that all layers of a VeRA adapter share, as large as the largest layer needs."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)


class VeRA(LoRA):
    """W' = W + diag(b) B diag(d) A, with A (rank, in) and B (out, rank) random, frozen and shared, b (out,) zero and
    d (rank,) 0.1 at first. There is no alpha.

    Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454. A layer takes the first
    columns of A and the first rows of B. They come from a seed; a file has their SHA-256, and on export themselves.
    """

    shapes: ClassVar[dict[str, tuple]] = {"b": ("out",), "d": ("rank",)}
    unread: ClassVar[tuple[str, ...]] = ("alpha", "target_rank")
    peft_type: ClassVar[str] = "VERA"
    peft_flags: ClassVar[dict[str, Any]] = {}
    peft_fields: ClassVar[dict[str, str]] = {"rank": "r", "dropout": "vera_dropout", "seed": "projection_prng_key"}
    peft_names: ClassVar[dict[str, str]] = {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    peft_shared: ClassVar[dict[str, str]] = {"A": "base_model.vera_A", "B": "base_model.vera_B"}

    def make(self) -> None:
        """Give it its tensors, such that W' is W."""
        self.b = self.parameter(self.out_features)
        self.d = self.parameter(self.rank)
        nn.init.constant_(self.d, D_AT_FIRST)

    @classmethod
    def share(cls, config: LoRAConfig, shapes: Iterable[tuple[int, int]]) -> Projections:
        """A and B for the largest of these linears."""
        outs, ins = zip(*shapes, strict=True)
        return Projections(*_drawn(config.seed, config.rank, max(ins), max(outs)))

    @classmethod
    def problems(cls, config: LoRAConfig) -> list[str]:
        """What makes no sense for this variant, in words."""
        given = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
        return [
            f"{name}: vera has one rank for all modules, since they share its matrices, and no alpha" for name in given
        ]

    def scaling(self, alpha: float) -> float:
        """What B A is multiplied by: nothing."""
        return 1.0

    def thin(self) -> tuple[Tensor, Tensor]:
        """diag(b) B diag(d), and A; differentiable."""
        B, A = self.shared.B[: self.out_features], self.shared.A[:, : self.in_features]
        return self.b[:, None] * B * self.d, A

    def fast_parameters(self) -> list[nn.Parameter]:
        """The tensors that LoRA+ lets learn faster: those that start at zero."""
        return [self.b]

    @classmethod
    def ranks_to_peft(cls, config: LoRAConfig, paths: Iterable[str]) -> dict[str, Any]:
        """Nothing: there are none. The words for what this type calls otherwise."""
        return {"bias": config.bias.replace("lora", "vera")}

    @classmethod
    def ranks_from_peft(cls, about: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing: there are none. The words for what this type calls otherwise."""
        return {"bias": str(about.get("bias", "none")).replace("vera", "lora")}
