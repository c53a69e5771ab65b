"""Attach, activate and detach: exactly the active adapters apply and train."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_lora import IDX, TARGETS, adapted, logits, same, state, tiny, trained, two_adapters

from lora.adapter import Adapter
from lora.attach import (
    activate,
    active_adapters,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    find_targets,
    using,
)
from lora.config import LoRAConfig
from lora.layers.linear import LoRALinear
from lora.layers.others import LoRAEmbedding
from lora.merge import cached_weights
from lora.optim import make_optimizer
from lora.peft_format import from_files, to_files
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
    paths = find_targets(tiny(), targets)
    assert {path.rpartition(".")[2] for path in paths} == names
    assert len(paths) == sum(1 if name == "lm_head" else 2 for name in names)


def test_a_target_may_be_a_path_but_not_part_of_a_name() -> None:
    assert find_targets(tiny(), "blocks.1.mlp.up_proj") == ["blocks.1.mlp.up_proj"]
    assert find_targets(tiny(), "mlp.up_proj") == ["blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj"]
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


def test_presets_come_from_the_model() -> None:
    model = torch.nn.ModuleDict({"first": LoRALinear(4, 4), "second": LoRALinear(4, 4), "table": LoRAEmbedding(4, 4)})
    with pytest.raises(UsageError, match=r"'all' matches no linear of this model; use names from: first, second$"):
        attach(model, LoRAConfig(targets="all"))
    model.lora_presets, model.lora_embeddings = {"some": ("second",), "all": ("first", "second")}, ("table",)
    with pytest.raises(UsageError, match=r"'third' matches no .*; use some, all or names from: first, second$"):
        attach(model, LoRAConfig(targets="third"))
    attach(model, LoRAConfig(rank=2, targets="some"))
    names = ["second.lora.default.A", "second.lora.default.B", "table.lora.default.weight"]
    assert list(trained(model)) == names
    again = from_files(to_files(Adapter.from_model(model)), "here")
    assert again.config.targets == "second" and again.config.train_embeddings


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_training_biases_of_a_model_without_them_is_refused(bias: str) -> None:
    model = tiny()
    with pytest.raises(UsageError, match=f"lora_bias={bias}: this model has no biases.*BIAS=True"):
        attach(model, LoRAConfig(bias=bias))
    assert adapter_names(model) == []


BAD_NAMES = ["", "a.b", "a b", "ü", "a/b", "keys", "pop", "training", "_modules", "_parameters", "one"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_taken_or_invalid_is_refused(name: str) -> None:
    model = adapted(LoRAConfig(), name="one")
    before = state(model)
    with pytest.raises(UsageError, match=r"^adapter name .*must be new"):
        attach(model, LoRAConfig(), name)
    assert same(state(model), before)
    assert active_adapters(model) == {"one": 1.0}


def test_a_name_that_is_not_attached_is_refused() -> None:
    base = tiny()
    for change in (activate, detach):
        with pytest.raises(UsageError, match="no adapter 'two' is attached; attached: none"):
            change(base, "two")
        assert all(p.requires_grad for p in base.parameters())
        model = adapted(LoRAConfig(), name="one")
        with pytest.raises(UsageError, match="no adapter 'two' is attached; attached: one"):
            change(model, "two")
        assert active_adapters(model) == {"one": 1.0}


def test_exactly_the_active_adapters_apply_and_train() -> None:
    model, plain = two_adapters(), logits(tiny(bias=True))
    own = adapter_parameters(model)
    for names in [("one",), ("two",), ("one", "two"), (), ("two", "one")]:
        activate(model, *names)
        assert tuple(active_adapters(model)) == names
        assert {key.split(".lora.")[1].split(".")[0] for key in trained(model)} == set(names)
        assert set(trained(model).values()) <= own
        assert torch.equal(logits(model), plain) == (names == ())
    assert adapter_names(model) == ["one", "two"]


def test_an_adapter_named_twice_applies_once() -> None:
    model = two_adapters()
    activate(model, "one")
    once = logits(model)
    activate(model, "one", "one")
    assert torch.equal(logits(model), once)


def test_a_name_means_strength_one_and_the_last_strength_given_wins() -> None:
    model = two_adapters()
    activate(model, "one", "two")
    whole = logits(model)
    for given in [({"one": 1.0, "two": 1.0},), ("one", {"two": 1}), ({"one": 0.5, "two": 2.0}, "one", "two")]:
        activate(model, *given)
        assert active_adapters(model) == {"one": 1.0, "two": 1.0}
        assert torch.equal(logits(model), whole)
    activate(model, {"one": 0.5}, "two")
    assert active_adapters(model) == {"one": 0.5, "two": 1.0}
    assert not torch.equal(logits(model), whole)
    expected = logits(model)
    activate(model)
    activate(model, {"one": 0.5, "two": 1.0})
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_that_is_not_finite_is_refused(strength: float) -> None:
    model = two_adapters()
    for change in (activate, lambda *given: using(*given).__enter__()):
        with pytest.raises(UsageError, match=r"adapter 'two': its strength is .*finite"):
            change(model, {"one": 0.5, "two": strength})
        with pytest.raises(UsageError, match="no adapter 'three' is attached; attached: one, two"):
            change(model, {"one": 0.5, "three": 1.0})
        assert active_adapters(model) == {"one": 1.0, "two": 1.0}


def test_at_strength_zero_an_adapter_adds_nothing() -> None:
    model, plain = two_adapters(), logits(tiny(bias=True))
    activate(model, {"one": 0.0, "two": 0.0})
    assert torch.equal(logits(model), plain)


def test_the_optimizer_updates_exactly_the_active_adapters() -> None:
    model = two_adapters()
    activate(model, {"two": 0.5})
    before = state(model)
    optimizer = make_optimizer(model, (0.9, 0.95), 0.1)
    mine = {p for group in optimizer.param_groups for p in group["params"]}
    assert mine == set(trained(model).values()) != set()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    model(IDX, TARGETS)[1].backward()
    optimizer.step()
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == {key for key in before if ".lora.two." in key}


def test_using_ends_with_its_block_and_does_not_change_what_trains() -> None:
    model = two_adapters()
    activate(model, "one")
    training, expected = trained(model).keys(), logits(model)
    outputs = {}
    for given in [("two",), ({"one": 0.5, "two": 2.0},), ()]:
        with pytest.raises(ZeroDivisionError), using(model, *given) as inside:
            outputs[str(given)] = logits(inside)
            assert trained(model).keys() == training
            raise ZeroDivisionError
        assert active_adapters(model) == {"one": 1.0}
        assert torch.equal(logits(model), expected)
    for given in [("two",), ({"one": 0.5, "two": 2.0},), ()]:
        activate(model, *given)
        assert torch.equal(logits(model), outputs[str(given)])


def test_cached_weights_are_cached_by_strength() -> None:
    model, chosen = two_adapters(), [{"one": 1.0}, {"one": 0.5}, {"one": 0.5, "two": 1.0}, {}, {"one": 1.0}]
    expected = []
    for strengths in chosen:
        with using(model, strengths):
            expected.append(logits(model))
    with cached_weights(model):
        for strengths, plain in zip(chosen, expected, strict=True):
            with using(model, strengths):
                assert torch.allclose(logits(model), plain, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)


def test_dropout_is_off_at_strengths_other_than_one() -> None:
    model = adapted(LoRAConfig(dropout=0.9), name="one").train()
    activate(model, {"one": 0.5})
    assert torch.equal(logits(model), logits(model))
    activate(model, {"one": 1.0})
    assert not torch.equal(logits(model), logits(model))


def test_detaching_keeps_the_strengths_of_the_others() -> None:
    model = two_adapters()
    attach(model, LoRAConfig(), "three")
    activate(model, {"one": 0.5, "three": 1.0, "two": -2.0})
    detach(model, "three")
    assert active_adapters(model) == {"one": 0.5, "two": -2.0}


def test_detaching_restores_the_base() -> None:
    base = tiny(bias=True)
    before, expected = state(base), logits(base)
    model = two_adapters()
    detach(model, "one")
    assert (adapter_names(model), active_adapters(model)) == (["two"], {"two": 1.0})
    detach(model, "two")
    assert (adapter_names(model), active_adapters(model)) == ([], {})
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
    attach(model, LoRAConfig(), "two")  # the name is free again


def test_detaching_an_inactive_adapter_does_not_change_the_active_one() -> None:
    model = two_adapters()
    activate(model, "two")
    before = logits(model)
    detach(model, "one")
    assert torch.equal(logits(model), before)
    assert len(trained(model)) == 2 * 4 + 2  # A and B on q and v of both blocks, and the embeddings


def test_switching_between_train_and_eval_never_changes_weights() -> None:
    model = two_adapters()
    before, expected = state(model), logits(model)
    for mode in (False, True, False):
        model.train(mode)
        assert same(state(model), before)
        assert torch.equal(logits(model), expected)
