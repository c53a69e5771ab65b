"""Adapters combine as sums of their deltas, never of their factors; their sizes and cosines."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lora import adapted, logits, plain_weights, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from lora.adapter import Adapter
from lora.attach import base_tensors
from lora.combine import combine, cosine, cosines, delta, delta_size
from lora.config import LoRAConfig
from lora.peft_format import save_adapter
from lora.variants.lora import LoRA
from lora.variants.registry import VARIANTS, variant_of
from runtime.errors import UsageError, UserError
from runtime.storage.tensors import fingerprint

BIG = LoRAConfig(rank=4, alpha=6.0, targets="all", bias="all")
SMALL = LoRAConfig(rank=2, alpha=3.0, targets="minimal", variant="rslora", train_embeddings=False)
WEIGHTS = (0.7, -1.3)


@functools.cache
def base() -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in base_tensors(tiny(bias=True)).items()}


def adapter(config: LoRAConfig, seed: int = 1, **metadata: str) -> Adapter:
    return Adapter.from_model(adapted(config, seed, bias=True), base_sha256=fingerprint(base()), **metadata)


def written_out(configs: list[LoRAConfig], weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """base + Σ w (effective tensor - base), dense, by the plain equation."""
    sums = {name: tensor.detach().double() for name, tensor in base().items()}
    for seed, (config, weight) in enumerate(zip(configs, weights, strict=True), 1):
        for name, tensor in plain_weights(adapted(config, seed, bias=True), config).items():
            sums[name] = sums[name] + weight * (tensor.detach() - base()[name]).double()
    return sums


def logits_with(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = tiny(bias=True)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return logits(model)


def logits_of(combined: Adapter) -> torch.Tensor:
    model = tiny(bias=True)
    combined.attach_to(model)
    return logits(model)


LOW_RANK = [name for name, variant in VARIANTS.items() if not variant.full_rank]


@st.composite
def configs(draw: st.DrawFn) -> LoRAConfig:
    """Configs of every low-rank variant, with rank and alpha patterns where it has them."""
    config = LoRAConfig(
        rank=draw(st.integers(1, 5)), alpha=draw(st.sampled_from([1.0, 6.0])), variant=draw(st.sampled_from(LOW_RANK)),
        targets=draw(st.sampled_from(["minimal", "all", "lm_head", "re:.*(up|q)_proj", "k_proj,blocks.1.mlp.up_proj"])),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])), train_embeddings=draw(st.booleans()),
    )  # fmt: skip
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 2.0}}
    patterns = {name: pattern for name, pattern in patterns.items() if draw(st.booleans())}
    try:
        variant_of(replace(config, **patterns))
        return replace(config, **patterns)
    except UsageError:  # a variant that has one rank
        return config


@settings(max_examples=15, deadline=None)
@given(
    parts=st.lists(st.tuples(configs(), st.sampled_from([1.0, 0.5, -1.0, 0.3, 0.0])), min_size=1, max_size=3),
    method=st.sampled_from(["cat", "linear"]),
)
def test_combine_sums_the_deltas_of_any_adapters(parts, method):
    configs, weights = zip(*parts, strict=True)
    adapters = [
        Adapter.from_model(adapted(config, seed, bias=True), base_sha256=fingerprint(base()))
        for seed, config in enumerate(configs, 1)
    ]
    made = combine(adapters, weights, base(), method)
    dense = {path: sum(w * d for w, d in _dense(adapters, weights, path)) for path in made.adapter.targets()}
    for path, expected in dense.items():
        B, A = delta(made.adapter, path, base())
        assert torch.allclose(B @ A, expected, atol=1e-6), path
    expected = {name: tensor.double() for name, tensor in base().items()}
    for one, weight in zip(adapters, weights, strict=True):
        for path, key, copy in one.trained_copies():
            expected[f"{path}.{key}"] = expected[f"{path}.{key}"] + weight * (copy - base()[f"{path}.{key}"]).double()
    for path, change in dense.items():
        expected[f"{path}.weight"] = expected[f"{path}.weight"] + change
    assert torch.allclose(logits_of(made.adapter), logits_with(expected), atol=2e-4, rtol=1e-4)


def _dense(adapters, weights, path):
    for one, weight in zip(adapters, weights, strict=True):
        if path in one.targets():
            W, exact = base()[f"{path}.weight"].double(), {name: t.double() for name, t in base().items()}
            yield weight, one.variant_at(path, exact).effective_weight(W).detach() - W


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_combine_equals_the_plain_equation_and_not_the_sum_of_factors(method):
    adapters = [adapter(BIG, 1), adapter(SMALL, 2)]
    made = combine(adapters, WEIGHTS, base(), method).adapter
    assert torch.allclose(logits_of(made), logits_with(written_out([BIG, SMALL], WEIGHTS)), atol=1e-4)
    # adding As and Bs separately would give something else
    one, two = adapter(BIG, 1), adapter(BIG, 2)
    path = "lm_head"
    (B1, A1), (B2, A2) = delta(one, path, base()), delta(two, path, base())
    B, A = delta(combine([one, two], (0.5, 0.5), base(), method).adapter, path, base())
    right, crossed = 0.5 * B1 @ A1 + 0.5 * B2 @ A2, (0.5 * B1 + 0.5 * B2) @ (A1 + A2)
    assert torch.allclose(B @ A, right, atol=1e-6)
    assert (crossed - right).norm() > 0.3 * right.norm()


def test_cat_keeps_all_ranks_and_linear_only_the_numerical_rank():
    one, two = adapter(BIG, 1), adapter(SMALL, 2)
    for method in ("cat", "linear"):
        made = combine([one, two], WEIGHTS, base(), method).adapter
        assert len(made.tensors["lm_head"]["A"]) == 4
        assert len(made.tensors["blocks.0.attention.q_proj"]["A"]) == 6
    assert combine([one, one], (0.5, 0.5), base(), "cat").adapter.config.rank == 8
    twice = combine([one, one], (0.5, 0.5), base(), "linear").adapter
    assert twice.config.rank == 4 and not twice.config.rank_pattern
    assert torch.allclose(logits_of(twice), logits_of(one), atol=1e-4)
    nothing = combine([one, one], (1.0, -1.0), base(), "linear").adapter
    assert nothing.config.rank == 1 and torch.allclose(logits_of(nothing), logits(tiny(bias=True)), atol=1e-5)


def test_one_adapter_with_weight_one_is_itself_and_with_weight_zero_the_base():
    one = adapter(BIG)
    assert torch.allclose(logits_of(combine([one], [1.0], base(), "cat").adapter), logits_of(one), atol=1e-5)
    assert torch.equal(logits_of(combine([one], [0.0], base(), "cat").adapter), logits(tiny(bias=True)))


def test_svd_is_the_best_approximation_and_reports_its_error():
    one, two = adapter(BIG, 1), adapter(SMALL, 2)
    made = combine([one, two], WEIGHTS, base(), "svd", rank=3)
    lost = whole = 0.0
    for path in made.adapter.targets():
        exact = sum(w * d for w, d in _dense([one, two], WEIGHTS, path))
        B, A = delta(made.adapter, path, base())
        S = torch.linalg.svdvals(exact)
        error = (B @ A - exact).norm()
        assert len(A) == 3 and torch.allclose(error, S[3:].norm(), rtol=1e-5)
        assert math.isclose(made.errors[path], error / exact.norm(), rel_tol=1e-5)
        lost, whole = lost + error**2, whole + exact.norm() ** 2
    assert math.isclose(made.error, (lost / whole).sqrt(), rel_tol=1e-5) and 0.01 < made.error < 1
    assert combine([one, two], WEIGHTS, base(), "linear").error < 1e-6
    with pytest.raises(UsageError, match="rank=7 is above 6, the rank of this combination"):
        combine([one, two], WEIGHTS, base(), "svd", rank=7)


class Renormalised(LoRA):
    """W' has the row norms of W and the direction of W + scale B A: a change of full rank, as in DoRA."""

    full_rank = True

    def effective_weight(self, W):
        V = super().effective_weight(W)
        return V * (W.norm(dim=1, keepdim=True) / V.norm(dim=1, keepdim=True))


def test_only_svd_combines_full_rank_changes(monkeypatch):
    monkeypatch.setitem(VARIANTS, "renormalised", Renormalised)
    full = adapter(replace(BIG, variant="renormalised", targets="q_proj", bias="none", train_embeddings=False))
    low = adapter(replace(SMALL, targets="q_proj"), 2)
    for method in ("cat", "linear"):
        with pytest.raises(UsageError, match=f"method={method}: renormalised .* full rank; only .*svd"):
            combine([full, low], WEIGHTS, base(), method)
    made = combine([full, low], WEIGHTS, base(), "svd", rank=5)
    path = "blocks.1.attention.q_proj"
    exact = sum(w * d for w, d in _dense([full, low], WEIGHTS, path))
    B, A = delta(made.adapter, path, base())
    assert made.adapter.config.variant == "lora" and torch.linalg.matrix_rank(exact) == 32
    assert math.isclose(made.errors[path], (B @ A - exact).norm() / exact.norm(), rel_tol=1e-5)


def test_cosines_and_sizes_are_those_of_the_dense_changes():
    one, two = adapter(BIG, 1), adapter(SMALL, 2)
    found = cosines(one, two, base())
    assert set(found) == set(one.targets())
    for path, value in found.items():
        (_, D1), *_ = _dense([one], [1], path)
        if path not in two.targets():
            assert value is None
            continue
        (_, D2), *_ = _dense([two], [1], path)
        assert math.isclose(value, (D1 * D2).sum() / (D1.norm() * D2.norm()), abs_tol=1e-6)
        got, S = delta_size(one, path, base()), torch.linalg.svdvals(D1)[:4]
        p = S / S.sum()
        assert math.isclose(got.norm, D1.norm(), rel_tol=1e-5)
        assert math.isclose(got.relative, D1.norm() / base()[f"{path}.weight"].norm(), rel_tol=1e-5)
        assert math.isclose(got.effective_rank, torch.exp(-(p * p.log()).sum()), rel_tol=1e-5)
    negative = combine([one], [-2.0], base(), "cat").adapter
    assert all(math.isclose(value, -1, rel_tol=1e-6) for value in cosines(one, negative, base()).values())
    zero = combine([one], [0.0], base(), "cat").adapter
    assert delta_size(zero, "lm_head", base()) == (0.0, 0.0, 0.0)
    assert cosine(delta(zero, "lm_head", base()), delta(one, "lm_head", base())) is None


def test_low_rank_factors_never_build_a_matrix_of_the_size_of_a_weight():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor) and t.device.type != "meta" and t.untyped_storage().data_ptr() != own:
                    self.numel = max(self.numel, t.numel())
            return out

    d, config = 300, LoRAConfig(rank=4, targets="lm_head", train_embeddings=False)
    weight = {"lm_head.weight": torch.randn(d, d)}
    own = weight["lm_head.weight"].untyped_storage().data_ptr()
    make = lambda: Adapter(config, {"lm_head": {"A": torch.randn(4, d), "B": torch.randn(d, 4)}})  # noqa: E731
    one, two = make(), make()
    with Largest() as seen:
        for method, rank in (("cat", None), ("linear", None), ("svd", 3)):
            combine([one, two], (1.0, 1.0), weight, method, rank)
        cosines(one, two, weight)
        delta_size(one, "lm_head", weight)
    assert d * 8 <= seen.numel < d * d / 10


def test_peft_reads_a_combination_with_several_ranks(tmp_path: Path):
    made = combine([adapter(BIG, 1), adapter(SMALL, 2)], WEIGHTS, base(), "linear").adapter
    assert made.config.rank_pattern
    save_adapter(tmp_path / "sum", made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny(bias=True), tmp_path / "sum")
    assert torch.allclose(logits(theirs), logits_of(made), atol=1e-5)


def test_adapters_that_cannot_be_combined_are_refused_by_name():
    one, two = adapter(BIG, 1), adapter(SMALL, 2)
    other = Adapter(two.config, two.tensors, {"base": "base-y", "base_sha256": "f" * 64})
    third = Adapter(two.config, two.tensors, {"base": "base-z", "base_sha256": "e" * 64})
    with pytest.raises(UserError, match=r"base-y \(f{12}\), base-z \(e{12}\), and the base is"):
        combine([one, other, third], (1, 1, 1), base())
    for method in ("cat", "linear"):
        with pytest.raises(UserError, match="not finite"):
            combine([one], (1e45,), base(), method)
    for arguments, message in (
        (([one, two], (1.0,), base()), "1 weights for 2 adapters"),
        (([one], (1.0,), base(), "ties"), "must be one of linear, cat, svd"),
        (([one], (1.0,), base(), "svd"), "method=svd needs a rank"),
        (([one], (1.0,), base(), "cat", 3), "method=cat takes no rank"),
    ):
        with pytest.raises(UsageError, match=message):
            combine(*arguments)


def test_a_sum_has_only_the_metadata_that_all_share():
    one, two = adapter(BIG, 1, dataset="folio", base="b"), adapter(SMALL, 2, dataset="milton", base="b")
    assert combine([one, two], (1, 1), base()).adapter.metadata == {"base": "b", "base_sha256": fingerprint(base())}
