"""AdaLoRA: updates in the form of a singular value decomposition, whose ranks go where they matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.variants.lora import LoRA

ORTHOGONALITY = 0.5  # weight of its term of the loss; the paper tries 0.1 to 0.5, PEFT takes this
SMOOTHING = 0.85  # of sensitivity and of its uncertainty, as in the paper
BEGIN, END = 0.1, 0.5  # shares of a run between which ranks are taken away; the paper's lie around these


def budget(done: int, steps: int, first: int, last: int) -> int:
    """How many ranks all modules together have after `done` of `steps` steps: the paper's cubic, equation 12."""
    begin, end = BEGIN * steps, END * steps
    left = min(1.0, max(0.0, 1 - (done - begin) / (end - begin)))
    return int(last + (first - last) * left**3)


class AdaLoRA(LoRA):
    """W' = W + (alpha / first rank) B diag(E) A, with E (rank, 1) zero, A (rank, in) and B (out, rank) normal.

    A term of the loss keeps the rows of A and the columns of B near to orthonormal. The least important ranks of all
    modules are set to zero step by step, until the budget is spent: `target_rank` on the average of the modules. A file
    has what is left, so ranks differ from module to module, and may be 0.

    Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512; P,
    Lambda and Q there are B, E and A here, as in PEFT. The term is the mean Frobenius norm, as in the authors' code and
    in PEFT, and not the sum of its squares as in the paper: that would drown the loss where there are many modules.
    """

    shapes: ClassVar[dict[str, tuple]] = LoRA.shapes | {"E": ("rank", 1)}
    least_rank: ClassVar[int] = 0
    unread: ClassVar[tuple[str, ...]] = ()
    peft_type: ClassVar[str] = "ADALORA"
    peft_flags: ClassVar[dict[str, Any]] = {}
    peft_fields: ClassVar[dict[str, str]] = {"rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    peft_names: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}

    def make(self) -> None:
        """Give it its tensors, such that W' is W."""
        self.A = self.parameter(self.rank, self.in_features)
        self.B = self.parameter(self.out_features, self.rank)
        self.E = self.parameter(self.rank, 1)
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        # Of each rank: E, its row of A and its column of B, side by side.
        triplets = torch.zeros(self.rank, 1 + self.in_features + self.out_features)
        self.register_buffer("sensitivity", triplets)
        self.register_buffer("uncertainty", triplets.clone())
        self.register_buffer("kept", torch.ones(self.rank, dtype=torch.bool))

    @classmethod
    def problems(cls, config: LoRAConfig) -> list[str]:
        """What makes no sense for this variant, in words."""
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
        """The average rank that a run ends with: two thirds of the first, as in the paper, unless the config tells."""
        return config.target_rank or max(1, round(config.rank / 1.5))

    def scaling(self, alpha: float) -> float:
        """What B diag(E) A is multiplied by, which the ranks that are left do not change; PEFT has no other alphas."""
        return self.config.alpha / self.config.rank

    def thin(self) -> tuple[Tensor, Tensor]:
        """B diag(E), and A; differentiable."""
        return self.B * self.E.t(), self.A

    def fast_parameters(self) -> list[nn.Parameter]:
        """The tensors that LoRA+ lets learn faster: those that start at zero."""
        return [self.E]

    def rank_left(self) -> int:
        """The rank of what `to_save` gives."""
        return int(self.kept.sum())

    def to_save(self) -> dict[str, Tensor]:
        """What of it an adapter's file holds: the ranks that are left."""
        left = {"A": self.A[self.kept], "B": self.B[:, self.kept], "E": self.E[self.kept]}
        return super().to_save() | left

    @torch.no_grad()
    def take_back(self, saved: Mapping[str, Tensor]) -> None:
        """Become what `to_save` gave."""
        rank = len(saved["E"])
        super().take_back({name: tensor for name, tensor in saved.items() if name not in self.shapes})
        self.kept.copy_(torch.arange(self.rank) < rank)
        self.E.zero_()
        self.E[:rank], self.A[:rank], self.B[:, :rank] = saved["E"], saved["A"], saved["B"]

    @staticmethod
    def extra_loss(entries: list[AdaLoRA]) -> Tensor:
        """How far the rows of the As and the columns of the Bs are from orthonormal, times its weight."""
        grams = [M @ M.t() for entry in entries if entry.rank for M in (entry.A, entry.B.t())]
        return ORTHOGONALITY * sum((G - torch.eye(len(G), device=G.device)).norm() for G in grams) / max(1, len(grams))

    @staticmethod
    @torch.no_grad()
    def after_step(entries: list[AdaLoRA], step: int, steps: int) -> None:
        """Measure what each rank matters, and set those to zero that are not among the most important ones."""
        first = sum(entry.rank for entry in entries)
        last = sum(min(entry.rank, AdaLoRA.target_rank(entry.config)) for entry in entries)
        if step < END * steps:  # then the ranks stay where they are
            importance = torch.cat([entry.importance() for entry in entries])
            kept = torch.zeros_like(importance, dtype=torch.bool)
            kept[importance.topk(budget(step + 1, steps, first, last)).indices] = True
            for entry, part in zip(entries, kept.split([entry.rank for entry in entries]), strict=True):
                entry.kept.copy_(part)
        for entry in entries:
            entry.E.mul_(entry.kept[:, None])

    def importance(self) -> Tensor:
        """What each rank matters (rank,): of E and, on the average, of its row and its column, sensitivity times
        uncertainty, both smoothed over the steps; equations 8 to 11 of the paper.

        Steps whose gradients overflowed, which change no weight, count as insensitive.
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
    def ranks_to_peft(cls, config: LoRAConfig, paths: Iterable[str]) -> dict[str, Any]:
        """The ranks that are left, as PEFT's config has them: which of the first ones, by path. It insists on a
        schedule, which is over."""
        ranks = {path: rank for path in paths if (rank := config.rank_at(path)) != config.rank}
        left = {f"{path}.lora_E": [i < rank for i in range(config.rank)] for path, rank in ranks.items()}
        over = {"tinit": 0, "tfinal": 0, "total_step": 1}
        return {"target_r": cls.target_rank(config), "rank_pattern": left or None} | over

    @classmethod
    def ranks_from_peft(cls, about: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a `LoRAConfig` for them. Raises what a config that is wrong makes it raise."""
        left = {name.removesuffix(".lora_E"): kept for name, kept in (about.get("rank_pattern") or {}).items()}
        if not all(type(one) is bool for kept in left.values() for one in kept):
            raise ValueError("only lists of true and false by module can be read")
        return {"rank_pattern": {path: sum(kept) for path, kept in left.items()}, "target_rank": about.get("target_r")}
