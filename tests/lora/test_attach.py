"""Attach, activate, merge, detach: the base never changes, what is active counts, everything comes off again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_lora import IDX, TARGETS, adapted, logits, plain_weights, randomise, same, state, tiny, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora.attach import (
    activate,
    active_adapters,
    adapter_names,
    adapter_parameters,
    attach,
    base_tensors,
    detach,
    merged,
    target_paths,
)
from lora.optim import make_optimizer
from lora.variants import LoRAConfig
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.checkpoint import fingerprint
from runtime.errors import UsageError

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
EVERYTHING = LoRAConfig(rank=4, alpha=6.0, targets="all", bias="all")


def two_adapters() -> BigramLanguageModelLoRA:
    """`one` on all linears, biases and embeddings; `two` on some linears and the embeddings; both active."""
    model = adapted(EVERYTHING, name="one", bias=True)
    torch.manual_seed(2)
    attach(model, LoRAConfig(rank=2, alpha=3.0, targets="minimal", variant="rslora"), "two")
    randomise(model, 2)
    activate(model, "one", "two")
    return model


def optimise(model: BigramLanguageModelLoRA, steps: int = 3) -> None:
    optimizer = make_optimizer(model, (0.9, 0.95), 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(steps):
        model(IDX, TARGETS)[1].backward()
        optimizer.step()
        optimizer.zero_grad()


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


def summed_weights(model: BigramLanguageModelLoRA) -> dict[str, torch.Tensor]:
    """Base + what `one` changes + what `two` changes, in float64."""
    base = {key: t.double() for key, t in base_tensors(model).items()}
    exact = tiny(bias=True).double()
    configs = {"one": EVERYTHING, "two": LoRAConfig(rank=2, alpha=3.0, variant="rslora")}
    with torch.no_grad():
        parts = [plain_weights(model, config, name) for name, config in configs.items()]
        exact.load_state_dict({key: sum(part[key].double() for part in parts) - base[key] for key in base})
    return exact


@pytest.mark.parametrize("autocast", [False, True])
def test_the_changes_of_two_active_adapters_add_up(autocast: bool) -> None:
    model = two_adapters()
    expected = logits(summed_weights(model))
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


def test_the_mode_never_changes_weights() -> None:
    model = two_adapters()
    before, expected = state(model), logits(model)
    for mode in (False, True, False):
        model.train(mode)
        assert same(state(model), before)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_training_moves_every_adapter_matrix_and_never_the_base(bias: str, embeddings: bool) -> None:
    model = tiny(bias=bias != "none")
    digest = fingerprint(base_tensors(model))
    attach(model, LoRAConfig(rank=4, bias=bias, train_embeddings=embeddings))
    before = state(model)
    optimise(model)
    after = state(model)
    assert fingerprint(base_tensors(model)) == digest
    assert {key for key in after if not torch.equal(after[key], before[key])} == set(trained(model))
    embedded = {key for key in trained(model) if "embedding" in key}
    assert len(embedded) == 2 * embeddings
    biases = {key for key in trained(model) if key.endswith(".bias")}
    assert len(biases) == {"none": 0, "lora_only": 2 * 6 + 1, "all": 2 * 6 + 1 + 2 * 2 + 1}[bias]


def test_a_resting_adapter_does_not_move() -> None:
    model = two_adapters()
    activate(model, "two")
    before = state(model)
    optimise(model, 2)
    moved = {key for key, t in state(model).items() if not torch.equal(t, before[key])}
    assert moved == set(trained(model))
    assert all(".lora.two." in key for key in moved)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = adapted(EVERYTHING, bias=True)
    groups = {group["weight_decay"]: group["params"] for group in make_optimizer(model, (0.9, 0.95), 0.1).param_groups}
    assert set(groups) == {0.1, 0.0}
    assert all(p.dim() == 2 for p in groups[0.1])
    assert all(p.dim() == 1 for p in groups[0.0])
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in trained(model).values()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_adapter_matrix_gets_a_gradient_over_a_frozen_base(recompute: bool, autocast: bool) -> None:
    found = []
    for recomputing in (False, recompute):
        model = adapted(LoRAConfig(dropout=0.3, train_embeddings=False), dropout=0.2)
        if recomputing:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        torch.manual_seed(4)
        with torch.autocast("cpu", enabled=autocast):
            loss = model(IDX, TARGETS)[1]
        loss.backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert len(found[0]) == 2 * (2 * 6 + 1)
    assert all(gradient.any() for gradient in found[0].values())
    assert same(*found)
