"""A base that changes under its adapters, and shared tensors: handled right, or refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from tiny_lora import EVERYTHING, IDX, TARGETS, adapted, logits, randomise, same, state, tiny, trained, variants
from torch import nn

from lora.adapter import Adapter
from lora.attach import activate, attach, base_tensors, detach, using
from lora.combine import combine
from lora.config import LoRAConfig
from lora.layers.linear import LoRALinear
from lora.merge import cached_weights, merge, merged
from lora.variants.registry import VARIANTS
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.errors import UsageError


def options(variant: str) -> dict:
    return {"lora_variant": variant, "lora_bias": "all", "lora_rank": 4}


def attached_first(variant: str, between: Callable = lambda model: model) -> BigramLanguageModelLoRA:
    """A new model with a fresh adapter, into which the tiny base is loaded afterwards."""
    torch.manual_seed(3)
    model = BigramLanguageModelLoRA(50, 32, 16, n_head=4, n_layer=2, bias=True, use_lora=True, **options(variant))
    between(model)
    assert not model.load_state_dict(tiny(bias=True).state_dict(), strict=False).unexpected_keys
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_base_may_be_loaded_under_a_fresh_adapter(variant: str, half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    model, base = attached_first(variant, lambda model: model.to(dtype)), tiny(bias=True).to(dtype)
    assert torch.equal(logits(model), logits(base))
    if not half:
        torch.manual_seed(3)
        BigramLanguageModelLoRA(50, 32, 16, n_head=4, n_layer=2, bias=True)
        attach(base, LoRAConfig(rank=4, variant=variant, bias="all"))
        assert same(state(model), state(base))
    randomise(model)
    with using(model), torch.no_grad():
        assert torch.equal(model(IDX)[0], logits(tiny(bias=True).to(dtype)))


def tied(**options) -> BigramLanguageModelLoRA:
    model = tiny(**options)
    model.lm_head.weight = model.token_embedding.weight
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_of_a_shared_tensor_sync_with_it_too(variant: str) -> None:
    model, other = tied(), tied(seed=9)
    attach(model, LoRAConfig(variant=variant))
    model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(logits(model), logits(other))


def test_loading_a_base_keeps_trained_copies() -> None:
    config = LoRAConfig(rank=4, variant="dora", bias="all")
    model = adapted(config, bias=True)
    own = {name: p.clone() for name, p in trained(model).items()}
    model.load_state_dict(tiny(seed=9, bias=True).state_dict(), strict=False)
    assert same(own, trained(model))
    whole = adapted(config, bias=True).state_dict()
    model = attached_first("dora")
    model.load_state_dict(whole)
    assert same(state(model), whole)


INSIDE = [
    merge,
    lambda model: merged(model).__enter__(),
    lambda model: attach(model, LoRAConfig(), "another"),
    lambda model: detach(model, "default"),
    lambda model: activate(model, "default"),
    lambda model: using(model).__enter__(),
    lambda model: Adapter.from_model(model, base_sha256="of the base").attach_to(model, "another"),
    lambda model: model.load_state_dict(state(model)),
]


@pytest.mark.parametrize("change", INSIDE)
def test_inside_merged_changes_are_refused(change: Callable) -> None:
    model = adapted(EVERYTHING, bias=True)
    before, expected = state(model), logits(model)
    with merged(model):
        inside = state(model)
        with pytest.raises(UsageError, match=r"inside `with merged\(model\):`"):
            change(model)
        assert same(state(model), inside) and torch.allclose(logits(model), expected, atol=1e-5)
    assert same(state(model), before) and torch.equal(logits(model), expected)
    merge(model)  # and afterwards it is free again
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("change", [*INSIDE[:4], *INSIDE[6:]])
def test_inside_cached_weights_changes_are_refused(change: Callable) -> None:
    model = adapted(EVERYTHING, bias=True)
    expected = logits(model)
    with cached_weights(model):
        cached = logits(model)
        with pytest.raises(UsageError, match=r"inside `with cached_weights\(model\):`"):
            change(model)
        assert torch.equal(logits(model), cached)
    assert torch.equal(logits(model), expected)


TIED = "token_embedding.weight and lm_head.weight are one tensor"
CHANGED = [LoRAConfig(), LoRAConfig(train_embeddings=False), LoRAConfig(targets="minimal")]


@pytest.mark.parametrize("config", CHANGED, ids=["both", "head", "embedding"])
def test_merging_into_a_shared_tensor_is_refused_until_it_is_untied(config: LoRAConfig) -> None:
    model = tied()
    attach(model, config)
    randomise(model)
    before, expected = state(model), logits(model)
    for change in (merge, lambda model: merged(model).__enter__()):
        with pytest.raises(UsageError, match=TIED) as error:
            change(model)
        assert "\n" not in str(error.value)
        assert same(state(model), before) and torch.equal(logits(model), expected)
    remedy = str(error.value).partition("untie them first: ")[2]
    exec(remedy, {"model": model, "torch": torch})
    with merged(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_a_shared_tensor_that_no_adapter_changes_does_not_matter() -> None:
    model = tied()
    attach(model, LoRAConfig(targets="minimal", train_embeddings=False))
    randomise(model)
    expected = logits(model)
    with merged(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    merge(model)
    assert model.lm_head.weight is model.token_embedding.weight
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_a_tensor_that_a_layer_of_torch_shares_counts_as_shared() -> None:
    model = nn.ModuleDict({"ours": LoRALinear(4, 4, bias=False), "torchs": nn.Linear(4, 4, bias=False)})
    model["torchs"].weight.data = model["ours"].weight.data  # other parameters, in one place
    attach(model, LoRAConfig(targets="ours"))
    randomise(model)
    with pytest.raises(UsageError, match=r"ours.weight and torchs.weight are one tensor"):
        merge(model)


def test_base_tensors_are_the_state_dict_of_the_base_under_every_name() -> None:
    model = tied()
    before = state(model)
    attach(model, LoRAConfig(variant="dora"))
    assert same(dict(base_tensors(model)), before)


def test_adapters_of_a_tied_base_are_copied_attached_and_combined_with_the_head() -> None:
    model = tied()
    attach(model, LoRAConfig(rank=4))
    randomise(model)
    adapter = Adapter.from_model(model)
    base = {name: tensor.detach() for name, tensor in base_tensors(model).items()}
    again = tied()
    adapter.attach_to(again)
    assert torch.equal(logits(again), logits(model))
    whole, half = tied(), combine([adapter, adapter], (0.25, 0.25), base).adapter
    half.attach_to(whole)
    activate(model, {"default": 0.5})
    assert "lm_head" in half.targets()
    assert torch.allclose(logits(whole), logits(model), atol=1e-5)


def half(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu"):
        return logits(model)


@pytest.mark.parametrize("autocast", [False, True])
def test_peft_merges_and_unmerges_on_our_layers(autocast: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj", "lm_head"])
    model = peft.get_peft_model(tiny(), config)
    randomise(model)
    compute = half if autocast else logits
    expected, base = compute(model), compute(tiny())
    near = 0.02 * expected.norm() if autocast else 1e-4
    for _ in range(2):
        model.merge_adapter()
        assert (compute(model) - expected).norm() < near < (base - expected).norm()
        model.unmerge_adapter()
        assert (compute(model) - expected).norm() < near
        with model.disable_adapter():
            assert (compute(model) - base).norm() < near


@pytest.mark.parametrize("context", [merged, cached_weights])
def test_a_copy_of_a_locked_model_has_neither_lock_nor_cache(context: Callable) -> None:
    model = adapted(LoRAConfig())
    with context(model):
        logits(model)
        twin = copy.deepcopy(model)
    detach(twin, "default")
    attach(twin, LoRAConfig())
    randomise(twin)
    assert not torch.allclose(logits(twin), logits(model), atol=1e-2)
    assert twin(IDX, TARGETS)[1].item() > 0 and len(variants(twin)) == len(variants(model))
