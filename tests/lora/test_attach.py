"""Attach, activate, detach: what is named counts and trains, everything comes off again."""

from __future__ import annotations

import pytest
import torch
from tiny_lora import adapted, logits, same, state, tiny, trained, two_adapters

from lora.attach import (
    activate,
    active_adapters,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    target_paths,
)
from lora.variants import LoRAConfig
from runtime.errors import UsageError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("minimal", {"q_proj", "v_proj"}),
        ("standard", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("all", {*LINEARS, "lm_head"}),
        ("k_proj, lm_head,", {"k_proj", "lm_head"}),
    ],
)
def test_targets_are_the_linears_of_these_names(targets: str, names: set[str]) -> None:
    paths = target_paths(tiny(), targets)
    assert {path.rpartition(".")[2] for path in paths} == names
    assert len(paths) == sum(1 if name == "lm_head" else 2 for name in names)


def test_a_target_may_be_a_path_but_not_half_a_name() -> None:
    assert target_paths(tiny(), "blocks.1.mlp.up_proj") == ["blocks.1.mlp.up_proj"]
    assert target_paths(tiny(), "mlp.up_proj") == ["blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj"]
    for wrong in ("proj", "roj", "q_proj.weight", "token_embedding", "norm_1", "attention", "", ",", "q_proj,c_attn,x"):
        model, before = tiny(), state(tiny())
        with pytest.raises(UsageError) as error:
            attach(model, LoRAConfig(targets=wrong))
        for name in ("c_attn", "x") if wrong.startswith("q_proj,") else (wrong,):
            assert repr(name) in str(error.value)
        assert "'q_proj'" not in str(error.value)
        assert all(name in str(error.value) for name in (*LINEARS, "lm_head"))
        assert same(state(model), before)
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_not_there_cannot_be_trained(bias: str) -> None:
    model = tiny()
    with pytest.raises(UsageError, match=f"lora_bias={bias}: this model has no biases.*BIAS=True"):
        attach(model, LoRAConfig(bias=bias))
    assert adapter_names(model) == []


BAD_NAMES = ["", "a.b", "a b", "ü", "a/b", "keys", "pop", "training", "_modules", "_parameters", "one"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_taken_or_unfit_is_refused(name: str) -> None:
    model = adapted(LoRAConfig(), name="one")
    before = state(model)
    with pytest.raises(UsageError, match=r"^adapter name .*must be new"):
        attach(model, LoRAConfig(), name)
    assert same(state(model), before)
    assert active_adapters(model) == ("one",)


def test_a_name_that_is_not_attached_is_refused() -> None:
    base = tiny()
    for change in (activate, detach):
        with pytest.raises(UsageError, match="no adapter 'two' is attached; attached: none"):
            change(base, "two")
        assert all(p.requires_grad for p in base.parameters())
        model = adapted(LoRAConfig(), name="one")
        with pytest.raises(UsageError, match="no adapter 'two' is attached; attached: one"):
            change(model, "two")
        assert active_adapters(model) == ("one",)


def test_exactly_the_active_adapters_count_and_train() -> None:
    model, plain = two_adapters(), logits(tiny(bias=True))
    own = adapter_parameters(model)
    for names in [("one",), ("two",), ("one", "two"), (), ("two", "one")]:
        activate(model, *names)
        assert active_adapters(model) == names
        assert {key.split(".lora.")[1].split(".")[0] for key in trained(model)} == set(names)
        assert set(trained(model).values()) <= own
        assert torch.equal(logits(model), plain) == (names == ())
    assert adapter_names(model) == ["one", "two"]


def test_an_adapter_named_twice_counts_once() -> None:
    model = two_adapters()
    activate(model, "one")
    once = logits(model)
    activate(model, "one", "one")
    assert torch.equal(logits(model), once)


def test_detached_a_model_is_the_base_again() -> None:
    base = tiny(bias=True)
    before, expected = state(base), logits(base)
    model = two_adapters()
    detach(model, "one")
    assert (adapter_names(model), active_adapters(model)) == (["two"], ("two",))
    detach(model, "two")
    assert (adapter_names(model), active_adapters(model)) == ([], ())
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
    attach(model, LoRAConfig(), "two")  # the name is free again


def test_detaching_one_that_rests_leaves_the_active_one_alone() -> None:
    model = two_adapters()
    activate(model, "two")
    before = logits(model)
    detach(model, "one")
    assert torch.equal(logits(model), before)
    assert len(trained(model)) == 2 * 4 + 2  # A and B on q and v of both blocks, and the embeddings


def test_the_mode_never_changes_weights() -> None:
    model = two_adapters()
    before, expected = state(model), logits(model)
    for mode in (False, True, False):
        model.train(mode)
        assert same(state(model), before)
        assert torch.equal(logits(model), expected)
