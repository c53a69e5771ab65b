"""Adapters as arithmetic: sums of what they change, how large that is, and how alike two of them are.

What an adapter changes in a linear is ΔW = W' - W, for LoRA a product B A of thin matrices with the scale in B. Every
sum here is one of ΔWs: adding As and Bs apart would bring in the products of one adapter's B with the other's A.
Nothing of the size of W is made of thin factors: (B, A) are decomposed by two thin QRs. All of it in fp64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora.adapter import Adapter
from lora.attach import REGEX
from lora.config import LoRAConfig
from lora.variants.lora import LoRA
from runtime.checkpoint import fingerprint
from runtime.errors import UsageError, UserError

METHODS = ("linear", "cat", "svd")
Base = Mapping[str, Tensor]  # a base's tensors by name


class Change(NamedTuple):
    """ΔW = B A of one linear: B (out, rank), A (rank, in)."""

    B: Tensor
    A: Tensor

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """ΔW = U diag(S) V with S falling: U (out, k), S (k,), V (k, in), for k the least of rank, out and in."""
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(self.B), torch.linalg.qr(self.A.T)
        U, S, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        return Q_B @ U, S, V @ Q_A.T

    def inner(self, other: Change) -> float:
        """The sum of the products of the two ΔWs' entries."""
        return ((self.B.T @ other.B) * (self.A @ other.A.T)).sum().item()


class Size(NamedTuple):
    """How large a ΔW is: Frobenius norm, its share of the base's, and effective rank.

    The effective rank is exp of the entropy of the singular values as shares of their sum: Roy and Vetterli 2007,
    "The effective rank: a measure of effective dimensionality".
    """

    norm: float
    relative: float
    effective_rank: float


@dataclass(frozen=True)
class Combined:
    """A sum of adapters as one. errors: by module, the relative Frobenius error of its ΔW; error: of all together."""

    adapter: Adapter
    errors: dict[str, float]
    error: float


def _change(variant: LoRA, W: Tensor) -> Change:
    if (factors := variant.factors()) is not None:
        B, A = factors
        return Change(B, A) if len(A) else Change(B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1]))
    dense = variant.effective_weight(W.double()).detach() - W.double()
    return Change(dense, torch.eye(W.shape[1], dtype=torch.float64))  # full rank: the whole ΔW is its own factor


@torch.no_grad()
def change(adapter: Adapter, path: str, base: Base) -> Change | None:
    """What an adapter changes in the linear at this path, or None."""
    variant = adapter.variant_at(path, base)
    return None if variant is None else _change(variant, base[f"{path}.weight"])


@torch.no_grad()
def size(adapter: Adapter, path: str, base: Base) -> Size:
    """How large the change is that an adapter makes at one of its targets."""
    _, S, _ = change(adapter, path, base).decomposed()
    norm, shares = S.norm().item(), S[S > 0] / S.sum()
    effective_rank = torch.exp(-(shares * shares.log()).sum()).item() if norm else 0.0
    return Size(
        norm, norm / torch.linalg.vector_norm(base[f"{path}.weight"], dtype=torch.float64).item(), effective_rank
    )


def cosine(one: Change | None, other: Change | None) -> float | None:
    """How alike two ΔWs are, from -1 to 1; None where either is missing or zero."""
    if one is None or other is None or not (product := one.inner(one) * other.inner(other)) > 0:
        return None
    return one.inner(other) / product**0.5


def target_paths(adapters: Sequence[Adapter], base: Base) -> list[str]:
    """The linears that any of the adapters changes, in the base's order."""
    changed = {path for adapter in adapters for path in adapter.targets()}
    return [path for name in base if (path := name.removesuffix(".weight")) in changed]


@torch.no_grad()
def diff(one: Adapter, other: Adapter, base: Base) -> dict[str, float | None]:
    """The cosine of two adapters' ΔWs at each linear that either changes."""
    return {
        path: cosine(change(one, path, base), change(other, path, base)) for path in target_paths((one, other), base)
    }


def _sum(adapters: Sequence[Adapter], weights: Sequence[float], path: str, base: Base, method: str) -> Change:
    """Σ w ΔW at one linear, as factors that stand side by side. Raises UsageError where a factor is the whole ΔW."""
    W, Bs, As = base[f"{path}.weight"], [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if (variant := adapter.variant_at(path, base)) is None:
            continue
        if method != "svd" and variant.factors() is None:
            name = adapter.config.variant
            raise UsageError(f"method={method}: {name} changes a weight at full rank; only method=svd can combine it")
        part = _change(variant, W)
        Bs.append(weight * part.B)
        As.append(part.A)
    return Change(torch.cat(Bs, 1), torch.cat(As))


def _refactored(whole: Change, rank: int | None) -> tuple[Change, float, float, int]:
    """ΔW in as few ranks as it has, at most `rank`: with the norms of what is left out and of all, and that rank.

    Singular values below fp32's precision of the factors are noise: the tensors are saved in fp32, and parts cancel.
    """
    U, S, V = whole.decomposed()
    noise = torch.finfo(torch.float32).eps * whole.B.norm() * whole.A.norm()
    there = max(1, int((S > noise).sum()))
    kept = min(there, rank or there)
    root = S[:kept].sqrt()
    return Change(U[:, :kept] * root, root[:, None] * V[:kept]), S[kept:].norm().item(), S.norm().item(), there


def _copies(adapters: Sequence[Adapter], weights: Sequence[float], base: Base, bias: str) -> dict[str, Tensor]:
    """Embeddings and biases by name: base + Σ w (copy - base). A bias that `bias` asks for is there in any case."""
    targets = target_paths(adapters, base)
    biases = [name for name in base if name.endswith(".bias")]
    wanted = {"none": [], "all": biases, "lora_only": [name for name in biases if name[:-5] in targets]}[bias]
    sums = {name: base[name].double() for name in wanted}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, key, copy in adapter.copies():
            own = base[f"{path}.{key}"].double()
            sums[f"{path}.{key}"] = sums.get(f"{path}.{key}", own) + weight * (copy.double() - own)
    return sums


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> LoRAConfig:
    """A config of scale 1 everywhere, whose commonest rank is the rank."""
    configs = [adapter.config for adapter in adapters]
    targets = {config.targets for config in configs}
    if len(targets) > 1:
        exact = any(text.startswith(REGEX) for text in targets)
        named = dict.fromkeys(name for adapter in adapters for name in adapter.target_modules())
        targets = {",".join(ranks if exact else named)}
    biases = {config.bias for config in configs}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: r for path, r in ranks.items() if r != rank}
    return LoRAConfig(
        rank=rank,
        alpha=float(rank),
        targets=targets.pop(),
        bias=next(kind for kind in ("all", "lora_only", "none") if kind in biases),
        train_embeddings=any(config.train_embeddings for config in configs),
        rank_pattern=others,
        alpha_pattern={path: float(r) for path, r in others.items()},
    )


@torch.no_grad()
def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], base: Base, method: str = "linear", rank: int | None = None
) -> Combined:
    """One adapter whose ΔW is Σ w ΔW of adapters that fit this base, and whose copies are base + Σ w (copy - base).

    method: `cat` keeps all factors, stacked; `linear` has the same ΔW in as few ranks as it needs; `svd` keeps the
    largest `rank` singular values, which no other matrix of that rank comes closer to (Eckart and Young 1936).

    Raises UserError for adapters of other bases and for a sum that is not finite; UsageError for an unknown method, as
    many weights as there are not adapters, a rank without `svd` or above what there is, and changes of full rank where
    the method is not `svd`.
    """
    _check(adapters, weights, base, method, rank)
    tensors: dict[str, dict[str, Tensor]] = {}
    lost, norms, most = {}, {}, 0
    for path in target_paths(adapters, base):
        part, lost[path], norms[path] = _sum(adapters, weights, path, base, method), 0.0, 0.0
        if method != "cat":
            part, lost[path], norms[path], there = _refactored(part, rank)
            most = max(most, there)
        tensors[path] = {"A": part.A.float(), "B": part.B.float()}
    if rank is not None and rank > most:
        raise UsageError(f"rank={rank} is above {most}, the rank of this combination; method=linear keeps all of it")
    config = _config(adapters, {path: len(group["A"]) for path, group in tensors.items()})
    for name, copy in _copies(adapters, weights, base, config.bias).items():
        path, _, key = name.rpartition(".")
        tensors.setdefault(path, {})[key] = copy.float()
    if not all(tensor.isfinite().all() for group in tensors.values() for tensor in group.values()):
        raise UserError("the sum has values that are not finite in fp32; take smaller weights")
    facts = {key: text for key, text in adapters[0].facts.items() if all(a.facts.get(key) == text for a in adapters)}
    error = sum(x**2 for x in lost.values()) ** 0.5 / (sum(x**2 for x in norms.values()) ** 0.5 or 1.0)
    return Combined(Adapter(config, tensors, facts), {p: lost[p] / (norms[p] or 1.0) for p in lost}, error)


def _check(adapters: Sequence[Adapter], weights: Sequence[float], base: Base, method: str, rank: int | None) -> None:
    if method not in METHODS:
        raise UsageError(f"method={method}: must be one of {', '.join(METHODS)}")
    if len(weights) != len(adapters) or not adapters:
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters: one weight for each is needed")
    if (method == "svd") != (rank is not None):
        raise UsageError(f"method={method} {'needs a rank' if rank is None else 'takes no rank; only svd does'}")
    here = fingerprint(dict(base))
    others = [a.facts for a in adapters if a.facts.get("base_sha256", here) != here]
    if others:
        told = ", ".join(f"{facts.get('base', 'another base')} ({facts['base_sha256'][:12]})" for facts in others)
        raise UserError(f"adapters of other bases cannot be combined: trained on {told}, and the base is {here[:12]}")
