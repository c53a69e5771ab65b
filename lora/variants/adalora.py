"""AdaLoRA: updates in the form of a singular value decomposition, with ranks allocated by importance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.variants.lora import LoRA

ORTHOGONALITY = 0.5  # weight of the regulariser; the paper tries 0.1 to 0.5, PEFT takes this
SMOOTHING = 0.85  # of sensitivity and of its uncertainty, as in the paper
BEGIN, END = 0.1, 0.5  # ranks are pruned between these fractions of a run; the paper's lie around them


def budget(done: int, steps: int, first: int, last: int) -> int:
    """Return the total rank of all modules after `done` of `steps` steps, by the paper's cubic schedule (equation 12)
    from `first` to `last`."""
    begin, end = BEGIN * steps, END * steps
    left = min(1.0, max(0.0, 1 - (done - begin) / (end - begin)))
    return int(last + (first - last) * left**3)


class AdaLoRA(LoRA):
    """W' = W + (alpha / initial rank) B diag(E) A, with E (rank, 1) zero, A (rank, in) and B (out, rank) normal.

    A regulariser keeps the rows of A and the columns of B close to orthonormal. Step by step the least important ranks
    of all modules are set to zero, until they are `target_rank` per module on average. An adapter file holds the ranks
    that are left, so ranks differ between modules and may be 0.

    Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512; P,
    Lambda and Q there are B, E and A here, as in PEFT. The regulariser is the mean Frobenius norm, as in the authors'
    code and in PEFT, not the paper's sum of squares, which would drown the loss where there are many modules.
    """

    shapes: ClassVar[dict[str, tuple]] = LoRA.shapes | {"E": ("rank", 1)}
    ignored_fields: ClassVar[tuple[str, ...]] = ()
    peft_type: ClassVar[str] = "ADALORA"
    peft_flags: ClassVar[dict[str, Any]] = {}
    peft_fields: ClassVar[dict[str, str]] = {"rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    peft_names: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}

    def make_tensors(self) -> None:
        self.A = self.parameter(self.rank, self.in_features)
        self.B = self.parameter(self.out_features, self.rank)
        self.E = self.parameter(self.rank, 1)
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        # For each rank: E, its row of A and its column of B, concatenated.
        triplets = torch.zeros(self.rank, 1 + self.in_features + self.out_features)
        self.register_buffer("sensitivity", triplets)
        self.register_buffer("uncertainty", triplets.clone())
        self.register_buffer("kept", torch.ones(self.rank, dtype=torch.bool))

    @classmethod
    def problems(cls, config: LoRAConfig) -> list[str]:
        target, first = config.target_rank, f"lora_rank={config.rank}"
        rules = {
            f"lora_target_rank={target!r}: must be a whole number from 1 to {first}": target is None
            or (type(target) is int and 1 <= target <= config.rank),
            f"rank_pattern: adalora takes ranks away from {first}, so none can be above it": all(
                rank <= config.rank for rank in config.rank_pattern.values()
            ),
            "alpha_pattern: adalora has one alpha for all modules, as in PEFT": not config.alpha_pattern,
        }
        return [message for message, holds in rules.items() if not holds]

    @staticmethod
    def target_rank(config: LoRAConfig) -> int:
        """Return the average rank at the end: the config's, or two thirds of the initial one, as in the paper."""
        return config.target_rank or max(1, round(config.rank / 1.5))

    def scaling(self, alpha: float) -> float:
        """Return the scale of B diag(E) A, which pruning does not change. As in PEFT, it is one for all modules."""
        return self.config.alpha / self.config.rank

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        return self.B * self.E.t(), self.A

    def lora_plus_parameters(self) -> list[nn.Parameter]:
        return [self.E]

    def current_rank(self) -> int:
        return int(self.kept.sum())

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the tensors that an adapter file holds: the ranks that are left."""
        left = {"A": self.A[self.kept], "B": self.B[:, self.kept], "E": self.E[self.kept]}
        return super().adapter_state() | left

    @torch.no_grad()
    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        rank = len(state["E"])
        super().load_adapter_state({name: tensor for name, tensor in state.items() if name not in self.shapes})
        self.kept.copy_(torch.arange(self.rank) < rank)
        self.E.zero_()
        self.E[:rank], self.A[:rank], self.B[:, :rank] = state["E"], state["A"], state["B"]

    @staticmethod
    def extra_loss(modules: list[AdaLoRA]) -> Tensor:
        """Return the regulariser (): how far the rows of the As and the columns of the Bs are from orthonormal."""
        grams = [M @ M.t() for module in modules if module.rank for M in (module.A, module.B.t())]
        return ORTHOGONALITY * sum((G - torch.eye(len(G), device=G.device)).norm() for G in grams) / max(1, len(grams))

    @staticmethod
    @torch.no_grad()
    def after_step(modules: list[AdaLoRA], step: int, steps: int) -> None:
        """Update the importance of each rank, and set all but the most important ranks to zero."""
        first = sum(module.rank for module in modules)
        last = sum(min(module.rank, AdaLoRA.target_rank(module.config)) for module in modules)
        if step < END * steps:  # afterwards the ranks stay where they are
            importance = torch.cat([module.importance() for module in modules])
            kept = torch.zeros_like(importance, dtype=torch.bool)
            kept[importance.topk(budget(step + 1, steps, first, last)).indices] = True
            for module, part in zip(modules, kept.split([module.rank for module in modules]), strict=True):
                module.kept.copy_(part)
        for module in modules:
            module.E.mul_(module.kept[:, None])

    def importance(self) -> Tensor:
        """Return the importance (rank,) of each rank, and update what it is made of: sensitivity times uncertainty,
        both smoothed over the steps, of E plus the means over its row and its column; equations 8 to 11 of the paper.

        A step whose gradients overflow changes no weight and counts as sensitivity 0.
        """
        triplets, gradients = (
            torch.cat([E, A, B.t()], 1)
            for E, A, B in ((self.E, self.A, self.B), (self.E.grad, self.A.grad, self.B.grad))
        )
        now = (triplets * gradients).abs_().nan_to_num_(0.0, 0.0, 0.0)
        self.sensitivity.lerp_(now, 1 - SMOOTHING)
        self.uncertainty.lerp_(now.sub_(self.sensitivity).abs_(), 1 - SMOOTHING)
        scores = self.sensitivity * self.uncertainty
        E, A, B = scores.split([1, self.A.shape[1], self.B.shape[0]], 1)
        return E[:, 0] + A.mean(1) + B.mean(1)

    @classmethod
    def special_fields_to_peft(cls, config: LoRAConfig, paths: Iterable[str]) -> dict[str, Any]:
        """Return which of the initial ranks are left, by path, and a finished schedule, without which PEFT refuses."""
        ranks = {path: rank for path in paths if (rank := config.rank_at(path)) != config.rank}
        left = {f"{path}.lora_E": [i < rank for i in range(config.rank)] for path, rank in ranks.items()}
        finished = {"tinit": 0, "tfinal": 0, "total_step": 1}
        return {"target_r": cls.target_rank(config), "rank_pattern": left or None} | finished

    @classmethod
    def special_fields_from_peft(cls, peft_config: Mapping[str, Any]) -> dict[str, Any]:
        left = {name.removesuffix(".lora_E"): kept for name, kept in (peft_config.get("rank_pattern") or {}).items()}
        if not all(type(one) is bool for kept in left.values() for one in kept):
            raise ValueError("only lists of true and false by module can be read")
        ranks = {path: sum(kept) for path, kept in left.items()}
        return {"rank_pattern": ranks, "target_rank": peft_config.get("target_r")}
