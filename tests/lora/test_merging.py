"""Several adapters at once, and adapters written into the weights for a while."""

from __future__ import annotations

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

from lora.attach import activate, active_adapters, attach, base_tensors, merged
from lora.variants import LoRAConfig
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA


def summed_model(model: BigramLanguageModelLoRA) -> BigramLanguageModelLoRA:
    """A base whose weights are base + what `one` changes + what `two` changes, in float64."""
    base = {key: t.double() for key, t in base_tensors(model).items()}
    exact = tiny(bias=True).double()
    with torch.no_grad():
        parts = [plain_weights(model, config, name) for name, config in (("one", EVERYTHING), ("two", SOME))]
        exact.load_state_dict({key: sum(part[key].double() for part in parts) - base[key] for key in base})
    return exact


@pytest.mark.parametrize("autocast", [False, True])
def test_the_changes_of_two_active_adapters_add_up(autocast: bool) -> None:
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
    """In bf16 a weight moves by 0.4 % or not at all; that a change is small must not make it vanish."""
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
    # along the change itself, where rounding averages out
    share = ((together - before).T * changed).sum() / changed.square().sum()
    assert 0.9 < share < 1.1


class BoomError(Exception):
    pass


@pytest.mark.parametrize("names", [("one",), ("two",), ("one", "two"), ()])
def test_merged_lasts_exactly_as_long_as_its_block(names: tuple[str, ...]) -> None:
    model = two_adapters()
    activate(model, *names)
    before, expected = state(model), logits(model)
    with merged(model) as inside:
        assert inside is model
        assert torch.allclose(logits(model), expected, atol=1e-5)
        plain = tiny(bias=True)
        plain.load_state_dict(base_tensors(model))  # what is merged is in the weights themselves
        assert torch.allclose(logits(plain), expected, atol=1e-5)
        with merged(model):
            assert torch.allclose(logits(model), expected, atol=1e-5)
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
    with pytest.raises(BoomError), merged(model):
        raise BoomError
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
    assert active_adapters(model) == names
    assert {p for p in model.parameters() if p.requires_grad} == set(trained(model).values())


def test_merging_under_autocast_is_still_in_fp32() -> None:
    model = two_adapters()
    with merged(model):
        expected = {key: p.detach().clone() for key, p in base_tensors(model).items()}
    with torch.autocast("cpu"), merged(model):
        assert same(base_tensors(model), expected)


def test_a_merge_that_fails_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_adapters()
    before, expected = state(model), logits(model)
    with monkeypatch.context() as patch, pytest.raises(BoomError):  # noqa: PT012
        patch.setattr(model.lm_head, "effective_tensors", lambda: (_ for _ in ()).throw(BoomError))
        with merged(model):
            pytest.fail("the merge should not have come this far")
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
