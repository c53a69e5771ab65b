"""Arithmetic of adapters: weighted sums, the size of what an adapter changes, and the similarity of two.

An adapter changes a linear's weight by ΔW = W' - W; for LoRA it is B A, with the scale in B. Every sum here is one of
ΔWs: adding As and Bs separately would add the products of one adapter's B with another's A. With low-rank factors no
matrix of the size of W is built: (B, A) is decomposed through two reduced QRs. All of it is computed in fp64.
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
from lora.variants.registry import VARIANTS
from runtime.errors import UsageError, UserError
from runtime.storage.tensors import fingerprint

METHODS = ("linear", "cat", "svd")
BaseTensors = Mapping[str, Tensor]  # by name


class Delta(NamedTuple):
    """ΔW = B A of one linear: B (out, rank), A (rank, in)."""

    B: Tensor
    A: Tensor

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (out, k), S (k,) and V (k, in) where ΔW = U diag(S) V, S descends and k = min(rank, out, in)."""
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(self.B), torch.linalg.qr(self.A.T)
        U, S, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        return Q_B @ U, S, V @ Q_A.T

    def inner(self, other: Delta) -> float:
        """Return the Frobenius inner product of two ΔWs."""
        return ((self.B.T @ other.B) * (self.A @ other.A.T)).sum().item()


class DeltaSize(NamedTuple):
    """The size of a ΔW: its Frobenius norm, that norm relative to W's, and its effective rank.

    The effective rank is exp of the entropy of the normalised singular values: Roy and Vetterli 2007, "The effective
    rank: a measure of effective dimensionality".
    """

    norm: float
    relative: float
    effective_rank: float


@dataclass(frozen=True)
class Combined:
    """A sum of adapters as one adapter. errors: the relative Frobenius error of each module's ΔW; error: of all."""

    adapter: Adapter
    errors: dict[str, float]
    error: float


@torch.no_grad()
def delta(adapter: Adapter, path: str, base: BaseTensors) -> Delta | None:
    """Return an adapter's ΔW of the linear at this path; None where it has none."""
    if (variant := adapter.variant_at(path, base)) is None:
        return None
    if variant.full_rank:
        W = base[f"{path}.weight"].double()
        return Delta(variant.effective_weight(W) - W, torch.eye(W.shape[1], dtype=torch.float64))
    B, A = (factor.double() for factor in variant.low_rank_factors())
    return Delta(variant.scale * B, A) if len(A) else Delta(B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1]))


@torch.no_grad()
def delta_size(adapter: Adapter, path: str, base: BaseTensors) -> DeltaSize:
    """Return the size of an adapter's ΔW at one of its targets."""
    _, S, _ = delta(adapter, path, base).svd()
    norm, shares = S.norm().item(), S[S > 0] / S.sum()
    effective_rank = torch.exp(-(shares * shares.log()).sum()).item() if norm else 0.0
    W_norm = torch.linalg.vector_norm(base[f"{path}.weight"], dtype=torch.float64).item()
    return DeltaSize(norm, norm / W_norm, effective_rank)


def cosine(one: Delta | None, other: Delta | None) -> float | None:
    """Return the cosine of two ΔWs, from -1 to 1; None where either is missing or zero."""
    if one is None or other is None or not (squares := one.inner(one) * other.inner(other)) > 0:
        return None
    return one.inner(other) / squares**0.5


def all_targets(adapters: Sequence[Adapter], base: BaseTensors) -> list[str]:
    """Return the linears that any of the adapters targets, in the base's order."""
    targets = {path for adapter in adapters for path in adapter.targets()}
    return [path for name in base if (path := name.removesuffix(".weight")) in targets]


@torch.no_grad()
def cosines(one: Adapter, other: Adapter, base: BaseTensors) -> dict[str, float | None]:
    """Return the cosine of two adapters' ΔWs at each linear that either targets."""
    return {path: cosine(delta(one, path, base), delta(other, path, base)) for path in all_targets((one, other), base)}


def _sum(adapters: Sequence[Adapter], weights: Sequence[float], path: str, base: BaseTensors) -> Delta:
    """Return Σ w ΔW of one linear, its factors concatenated."""
    deltas = [(delta(adapter, path, base), weight) for adapter, weight in zip(adapters, weights, strict=True)]
    parts = [Delta(weight * part.B, part.A) for part, weight in deltas if part is not None]
    return Delta(torch.cat([part.B for part in parts], 1), torch.cat([part.A for part in parts]))


def _truncated(whole: Delta, rank: int | None) -> tuple[Delta, float, float, int]:
    """Return ΔW with its numerical rank, or `rank` if that is less; the norms of what this drops and of all; and the
    numerical rank.

    Singular values below fp32's precision of the factors are noise: the tensors are saved in fp32, and terms cancel.
    """
    U, S, V = whole.svd()
    noise = torch.finfo(torch.float32).eps * whole.B.norm() * whole.A.norm()
    numerical_rank = max(1, int((S > noise).sum()))
    kept = min(numerical_rank, rank or numerical_rank)
    root = S[:kept].sqrt()
    truncated = Delta(U[:, :kept] * root, root[:, None] * V[:kept])
    return truncated, S[kept:].norm().item(), S.norm().item(), numerical_rank


def _sum_copies(
    adapters: Sequence[Adapter], weights: Sequence[float], base: BaseTensors, bias: str
) -> dict[str, Tensor]:
    """Return embeddings and biases by name: base + Σ w (copy - base). All biases that `bias` selects are included."""
    targets = all_targets(adapters, base)
    biases = [name for name in base if name.endswith(".bias")]
    wanted = {"none": [], "all": biases, "lora_only": [name for name in biases if name[:-5] in targets]}[bias]
    sums = {name: base[name].double() for name in wanted}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, key, copy in adapter.trained_copies():
            own = base[f"{path}.{key}"].double()
            sums[f"{path}.{key}"] = sums.get(f"{path}.{key}", own) + weight * (copy.double() - own)
    return sums


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> LoRAConfig:
    """Return a config with scale 1 everywhere, whose rank is the most common of these ranks by path."""
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


def _check(adapters: Sequence[Adapter], weights: Sequence[float], here: str, method: str, rank: int | None) -> None:
    """here: the fingerprint of the base."""
    if method not in METHODS:
        raise UsageError(f"method={method}: must be one of {', '.join(METHODS)}")
    if len(weights) != len(adapters) or not adapters:
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters: one weight for each is needed")
    if (method == "svd") != (rank is not None):
        raise UsageError(f"method={method} {'needs a rank' if rank is None else 'takes no rank; only svd does'}")
    names = [adapter.config.variant for adapter in adapters if VARIANTS[adapter.config.variant].full_rank]
    if names and method != "svd":
        raise UsageError(f"method={method}: {names[0]} changes a weight at full rank; only method=svd can combine it")
    if others := [a.metadata for a in adapters if a.metadata.get("base_sha256", here) != here]:
        bases = ", ".join(f"{other.get('base', 'another base')} ({other['base_sha256'][:12]})" for other in others)
        raise UserError(f"adapters of other bases cannot be combined: trained on {bases}, and the base is {here[:12]}")


@torch.no_grad()
def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    base: BaseTensors,
    method: str = "linear",
    rank: int | None = None,
    base_sha256: str = "",
) -> Combined:
    """Combine adapters of this base into one whose ΔW is Σ w ΔW and whose copies are base + Σ w (copy - base).

    method: `cat` concatenates all factors; `linear` has the same ΔW at the lowest rank that holds it; `svd` keeps the
    largest `rank` singular values, the best approximation of that rank (Eckart and Young 1936). base_sha256: the
    fingerprint of the base, if it is known already.

    Raises UserError for adapters of other bases and for a sum that is not finite; UsageError for an unknown method, a
    wrong number of weights, a rank without `svd` or above that of the sum, and full-rank changes without `svd`.
    """
    _check(adapters, weights, base_sha256 or fingerprint(dict(base)), method, rank)
    tensors: dict[str, dict[str, Tensor]] = {}
    lost, norms, max_rank = {}, {}, 0
    for path in all_targets(adapters, base):
        part, lost[path], norms[path] = _sum(adapters, weights, path, base), 0.0, 0.0
        if method != "cat":
            part, lost[path], norms[path], numerical_rank = _truncated(part, rank)
            max_rank = max(max_rank, numerical_rank)
        tensors[path] = {"A": part.A.float(), "B": part.B.float()}
    if rank is not None and rank > max_rank:
        raise UsageError(
            f"rank={rank} is above {max_rank}, the rank of this combination; method=linear keeps all of it"
        )
    config = _config(adapters, {path: len(group["A"]) for path, group in tensors.items()})
    for name, copy in _sum_copies(adapters, weights, base, config.bias).items():
        path, _, key = name.rpartition(".")
        tensors.setdefault(path, {})[key] = copy.float()
    if not all(tensor.isfinite().all() for group in tensors.values() for tensor in group.values()):
        raise UserError("the sum has values that are not finite in fp32; take smaller weights")
    first, *others = (adapter.metadata for adapter in adapters)
    metadata = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
    error = sum(x**2 for x in lost.values()) ** 0.5 / (sum(x**2 for x in norms.values()) ** 0.5 or 1.0)
    return Combined(Adapter(config, tensors, metadata), {p: lost[p] / (norms[p] or 1.0) for p in lost}, error)
