"""Several active adapters, and adapters merged into the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_lora import (
    EVERYTHING,
    IDX,
    SOME,
    TARGETS,
    logits,
    plain_weights,
    randomise,
    same,
    state,
    tiny,
    trained,
    two_adapters,
)
from torch import nn

from lora.attach import activate, active_adapters, adapter_names, attach, base_tensors
from lora.config import LoRAConfig
from lora.merge import merge, merged
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA


def summed_model(model: BigramLanguageModelLoRA, one: float = 1.0, two: float = 1.0) -> BigramLanguageModelLoRA:
    """A model with the weights base + strength * change by `one` + strength * change by `two`, in float64."""
    exact, precise = tiny(bias=True).double(), copy.deepcopy(model).double()
    base = base_tensors(precise)
    with torch.no_grad():
        parts = [(plain_weights(precise, EVERYTHING, "one"), one), (plain_weights(precise, SOME, "two"), two)]
        exact.load_state_dict({key: W + sum(s * (part[key] - W) for part, s in parts) for key, W in base.items()})
    return exact


STRENGTHS = [{"one": 0.5}, {"two": -1.0}, {"one": 0.25, "two": 1.0}, {"one": 1.0, "two": 3.0}, {"one": 1.0}]


@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
def test_a_strength_multiplies_the_change_of_weights_embeddings_and_biases(strengths: dict) -> None:
    model = two_adapters()
    exact = summed_model(model, **({"one": 0.0, "two": 0.0} | strengths))
    activate(model, strengths)
    with merged(model):
        for name, wanted in exact.named_parameters():
            assert torch.allclose(model.get_parameter(name).double(), wanted, rtol=3e-7, atol=3e-7), name
    assert torch.allclose(logits(model).double(), logits(exact), atol=2e-5)


def test_at_strength_s_gradients_are_those_of_the_formula() -> None:
    model = two_adapters()
    activate(model, {"one": 0.5})
    exact = copy.deepcopy(model).double()
    base, changed = base_tensors(exact), plain_weights(exact, EVERYTHING, "one")
    weights = {key: W + 0.5 * (changed[key] - W) for key, W in base.items()}
    loss = torch.func.functional_call(tiny(bias=True).double(), weights, (IDX, TARGETS))[1]
    wanted = torch.autograd.grad(loss, list(trained(exact).values()))
    model(IDX, TARGETS)[1].backward()
    for (name, p), gradient in zip(trained(model).items(), wanted, strict=True):
        assert (p.grad - gradient).norm() < 1e-4 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("autocast", [False, True])
def test_two_active_adapters_add_up(autocast: bool) -> None:
    model = two_adapters()
    expected = logits(summed_model(model))
    with torch.autocast("cpu", enabled=autocast):
        found = logits(model)
    assert (found - expected).norm() < (0.02 if autocast else 1e-6) * expected.norm()
    with merged(model):
        assert torch.allclose(logits(model).double(), expected, atol=1e-5)
    model(IDX, TARGETS)[1].backward()
    assert all(p.grad.any() for p in trained(model).values())


def test_small_changes_of_two_adapters_are_not_rounded_away_in_bf16() -> None:
    """A bf16 weight changes by at least 0.4 % or not at all; small updates must not vanish."""
    layer = nn.Sequential(tiny().lm_head)
    W, x = layer[0].weight.detach(), torch.eye(32)
    changed = torch.zeros_like(W, dtype=torch.float64)
    for seed, name in enumerate(("one", "two")):
        attach(layer, LoRAConfig(rank=2, alpha=2.0, targets="0"), name)
        randomise(layer, seed, 0.001)
        changed += layer[0].lora[name].effective_weight(W).detach().double() - W
    activate(layer, "one", "two")
    with torch.no_grad(), torch.autocast("cpu"):
        together = layer(x).double()
        activate(layer)
        before = layer(x).double()
    # projected on the change, where rounding averages out
    share = ((together - before).T * changed).sum() / changed.square().sum()
    assert 0.9 < share < 1.1


@pytest.mark.parametrize("strengths", [{"one": 1.0, "two": 0.5}, {"two": 1.0}, {}], ids=str)
def test_merge_writes_the_effective_weights_and_detaches_every_adapter(strengths: dict) -> None:
    model, plain = two_adapters(), tiny(bias=True)
    activate(model, strengths)
    expected = logits(model)
    with merged(model):
        plain.load_state_dict(base_tensors(model))
    merge(model)
    assert (adapter_names(model), active_adapters(model)) == ([], {})
    assert same(state(model), state(plain))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert torch.equal(logits(model), logits(plain))
    assert not trained(model)
    attach(model, LoRAConfig(), "one")  # and it is a base that can be adapted


def test_merge_changes_nothing_if_it_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_adapters()
    before, expected = state(model), logits(model)
    with monkeypatch.context() as patch, pytest.raises(BoomError):  # noqa: PT012
        patch.setattr(model.lm_head, "effective", lambda name: (_ for _ in ()).throw(BoomError))
        merge(model)
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)


class BoomError(Exception):
    pass


@pytest.mark.parametrize("names", [("one",), ("two",), ("one", "two"), ()])
def test_merged_ends_with_its_block(names: tuple[str, ...]) -> None:
    model = two_adapters()
    activate(model, *names)
    before, expected = state(model), logits(model)
    with merged(model) as inside:
        assert inside is model
        assert torch.allclose(logits(model), expected, atol=1e-5)
        plain = tiny(bias=True)
        plain.load_state_dict(base_tensors(model))  # what is merged is in the weights themselves
        assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
    with pytest.raises(BoomError), merged(model):
        raise BoomError
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
    assert tuple(active_adapters(model)) == names
    assert {p for p in model.parameters() if p.requires_grad} == set(trained(model).values())


def test_merging_under_autocast_is_still_in_fp32() -> None:
    model = two_adapters()
    with merged(model):
        expected = {key: p.detach().clone() for key, p in base_tensors(model).items()}
    with torch.autocast("cpu"), merged(model):
        assert same(base_tensors(model), expected)


def test_merged_restores_the_weights_if_it_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_adapters()
    before, expected = state(model), logits(model)
    with monkeypatch.context() as patch, pytest.raises(BoomError):  # noqa: PT012
        patch.setattr(model.lm_head, "effective", lambda name: (_ for _ in ()).throw(BoomError))
        with merged(model):
            pytest.fail("the merge should not have come this far")
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
