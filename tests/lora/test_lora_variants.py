"""Every variant against its equation: forward, gradients, merged, in every precision, and when fresh."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tiny_lora import IDX, TARGETS, adapted, logits, plain_weights, randomise, same, state, tiny, trained
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lora import functional
from lora.attach import activate, attach, detach
from lora.config import LoRAConfig
from lora.functional import LowRankLinear, lora_linear, low_rank_gradients_pay
from lora.layers.dropout import dropout as dropout_of
from lora.layers.linear import LoRALinear
from lora.merge import merged
from lora.variants.registry import VARIANTS, variant_of
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.errors import UsageError

CONFIGS = [
    LoRAConfig(rank=4, alpha=6.0, targets=targets, variant=variant, bias=bias, train_embeddings=embeddings)
    for variant, targets, bias, embeddings in itertools.product(
        VARIANTS, ("minimal", "standard", "all", "k_proj, mlp.up_proj,blocks.1.mlp.down_proj"),
        ("none", "all", "lora_only"), (False, True),
    )
]  # fmt: skip


@pytest.fixture(params=["from the weight", "from the tokens"])
def gradients_come(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing the gradients of A and B, whichever would be faster."""
    monkeypatch.setattr(functional, "MIN_SAVED", math.inf if request.param == "from the weight" else -math.inf)
    return request.param


def name_of(config: LoRAConfig) -> str:
    return f"{config.variant}-{config.targets[:8]}-{config.bias}-{config.train_embeddings}"


def near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def gradients(model: BigramLanguageModelLoRA) -> dict[str, Tensor]:
    model(IDX, TARGETS)[1].backward()
    return {name: p.grad for name, p in trained(model).items()}


def check_equation(model: BigramLanguageModelLoRA, config: LoRAConfig) -> Tensor:
    """Check logits and gradients against the plain equation in float64; return the logits."""
    exact = copy.deepcopy(model).double()
    expected = functional_call(tiny(bias=config.bias != "none").double(), plain_weights(exact, config), (IDX, TARGETS))
    names = list(trained(exact))
    wanted = dict(zip(names, torch.autograd.grad(expected[1], list(trained(exact).values())), strict=True))
    assert near(logits(exact), expected[0], 1e-12)
    found = gradients(exact)
    for name in names:
        assert wanted[name].abs().max() > 0, name
        assert near(found[name], wanted[name], 1e-11), name
    assert all(p.grad is None for p in exact.parameters() if not p.requires_grad)
    return expected[0].detach()


@pytest.mark.usefixtures("gradients_come")
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_an_adapted_model_is_the_model_with_its_effective_weights(config: LoRAConfig) -> None:
    model = adapted(config, bias=config.bias != "none")
    expected, before = check_equation(model, config), state(model)
    training = logits(model.train())
    assert near(training, expected, 1e-5)
    assert torch.equal(logits(model.eval()), training)
    assert not near(logits(tiny(bias=config.bias != "none")), expected, 1e-2)  # the adapter does something
    with merged(model):
        assert near(logits(model), expected, 1e-5)
    assert same(state(model), before)
    with torch.autocast("cpu"):
        half, loss = model(IDX, TARGETS)
    loss.backward()
    assert (half.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert (half - expected).norm() < 0.02 * expected.norm()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in trained(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_a_linear_with_the_effective_weight(variant: str, bias: bool) -> None:
    layer = LoRALinear(12, 7, bias=bias)
    model = torch.nn.Sequential(layer)
    attach(model, LoRAConfig(rank=3, alpha=5.0, targets="0", variant=variant))
    randomise(model)
    (module,) = layer.variants()
    x, W = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)), layer.weight
    b = layer.bias if bias else torch.zeros(7)
    expected = F.linear(x.double(), copy.deepcopy(module).double().effective_weight(W.double()), b.double())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 0.05)):
        given = x.to(dtype), W.detach().to(dtype), b.to(dtype) if bias else None
        fast = copy.deepcopy(module).to(dtype)(*given)
        with torch.autocast("cpu"):  # the input's dtype is what counts
            assert torch.equal(copy.deepcopy(module).to(dtype)(*given), fast)
        with torch.no_grad():
            few = copy.deepcopy(module).to(dtype)(*given)
        for y in (fast, few):
            assert y.dtype == dtype
            assert near(y, expected, tolerance)


@pytest.mark.usefixtures("gradients_come")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("trains", list(itertools.product((False, True), (False, True), (None, False, True))))
def test_gradients_are_those_of_the_formula(trains: tuple[bool, bool, bool | None], dropout: float) -> None:
    x_trains, W_trains, bias_trains = trains
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 2, 4), "W": (3, 4), "bias": (3,), "A": (2, 4), "B": (3, 2)}
    given = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    if bias_trains is None:
        given["bias"] = None
    needs = {"x": x_trains, "W": W_trains, "bias": bool(bias_trains), "A": True, "B": True}
    for key, need in needs.items():
        if need:
            given[key].requires_grad_()

    def fused(*_: Tensor) -> Tensor:
        torch.manual_seed(5)
        x, *part = given.values()
        return lora_linear(x, [LowRankLinear(*part, 1.5)], dropout)[0]

    torch.manual_seed(5)
    kept = dropout_of(torch.ones(2, 2, 4, dtype=torch.float64), dropout)
    plain = F.linear(given["x"], given["W"], given["bias"]) + 1.5 * (given["x"] * kept) @ given["A"].T @ given["B"].T
    assert near(fused(), plain, 1e-12)
    leaves = [given[key] for key, need in needs.items() if need]
    weights = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    for mine, its in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (fused(), plain)), strict=True):
        assert near(mine, its, 1e-12)
    torch.autograd.gradcheck(fused, leaves)


@pytest.mark.parametrize(
    ("sizes", "tokens", "pay"),
    [
        ([(128, 128)], 4096, False),
        ([(512, 128)], 512, False),
        ([(512, 128)], 4096, True),
        ([(384, 384)] * 3, 4096, True),
    ],
)
def test_low_rank_gradients_are_used_where_they_pay(sizes: list[tuple[int, int]], tokens: int, pay: bool) -> None:
    parts = [
        LowRankLinear(torch.empty(o, i), None, torch.ones(8, i, requires_grad=True), torch.ones(o, 8), 1.0)
        for o, i in sizes
    ]
    assert low_rank_gradients_pay(tokens, parts) == pay
    ys = lora_linear(torch.ones(tokens, sizes[0][1]), parts)
    assert [y.shape for y in ys] == [(tokens, sum(out for out, _ in sizes))]
    graph, made = [ys[0].grad_fn], ""
    while graph:
        made += str(graph)
        graph = [node for made_from in graph for node, _ in made_from.next_functions if node]
    assert ("EffectiveLinear" in made) == pay


def test_a_second_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "MIN_SAVED", -math.inf)
    x, W, A, B = (torch.randn(3, 3, requires_grad=True) for _ in range(4))
    (slope,) = torch.autograd.grad(
        lora_linear(x, [LowRankLinear(W, None, A, B, 1.0)])[0].square().sum(), A, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.usefixtures("gradients_come")
def test_in_bf16_gradients_have_the_dtypes_of_their_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    x, W, A, B = (torch.randn(8, 8, generator=generator).requires_grad_() for _ in range(4))
    (y,) = lora_linear(x.bfloat16(), [LowRankLinear(W, None, A, B, 0.5)])
    plain = F.linear(x, W) + 0.5 * x @ A.T @ B.T
    assert y.dtype == torch.bfloat16
    assert near(y, plain, 0.15)
    leaves = (x, W, A, B)
    for mine, its in zip(*(torch.autograd.grad(out.float().sum(), leaves) for out in (y, plain)), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - its).norm() < 0.02 * its.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_dropout_applies_to_the_low_rank_path(variant: str, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    layer = LoRALinear(12, 7, bias=bias)
    attach(torch.nn.Sequential(layer), LoRAConfig(rank=3, dropout=0.4, targets="0", variant=variant))
    randomise(layer)
    (module,) = layer.to(dtype).train().variants()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    kept = dropout_of(torch.ones_like(x), 0.4)
    B, A = module.low_rank_factors()
    added = module.scale * B @ A
    plain = F.linear(x, layer.weight) + F.linear(x * kept, added)
    if (magnitude := getattr(module, "magnitude", None)) is not None:
        plain = plain * (magnitude / (layer.weight + added).detach().norm(dim=1))
    plain = plain + layer.bias if bias else plain
    torch.manual_seed(3)
    found = module(x, layer.weight, layer.bias)
    assert near(found, plain, tolerance) and not near(found, layer(x.detach()), 10 * tolerance)
    for mine, its in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (found, plain)), strict=True):
        assert (mine - its).norm() <= 10 * tolerance * its.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_an_adapter_of_a_half_precision_base_is_in_fp32(autocast: bool) -> None:
    config = LoRAConfig(rank=4, bias="all")
    expected = logits(adapted(config, bias=True))
    model = tiny(bias=True).to(torch.bfloat16)
    torch.manual_seed(1)
    attach(model, config)
    randomise(model)
    with torch.autocast("cpu", enabled=autocast):
        found, loss = model(IDX, TARGETS)
    loss.backward()
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in trained(model).values())
    before = state(model)
    with merged(model):
        assert (logits(model) - expected).norm() < 0.03 * expected.norm()
    assert same(state(model), before)


def test_dropout_is_on_the_adapters_input_and_only_in_training() -> None:
    config = LoRAConfig(dropout=0.5, targets="all", train_embeddings=False)
    model, plain = adapted(config), adapted(LoRAConfig(targets="all", train_embeddings=False))
    assert torch.equal(logits(model.eval()), logits(plain))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(*(torch.manual_seed(3) and logits(model) for _ in range(2)))
    activate(model)
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize(("variant", "scale"), [("lora", 5.0 / 3), ("rslora", 5.0 / math.sqrt(3)), ("dora", 5.0 / 3)])
def test_a_fresh_adapter_changes_nothing_and_has_the_scale_of_its_paper(variant: str, scale: float) -> None:
    model = tiny(bias=True)
    before = logits(model)
    attach(model, LoRAConfig(rank=3, alpha=5.0, variant=variant, bias="all"))
    assert torch.equal(logits(model), before)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            (module,) = layer.variants()
            bound = 1 / math.sqrt(layer.in_features)  # kaiming-uniform with a = sqrt(5)
            assert module.scale == scale
            assert 0.8 * bound < module.A.abs().max() <= bound
            assert not module.B.any()
            assert module.A.shape == (3, layer.in_features)
            assert module.B.shape == (layer.out_features, 3)
            assert torch.equal(module.bias, layer.bias)


def test_a_new_adapter_takes_the_models_training_mode() -> None:
    model = tiny().eval()
    attach(model, LoRAConfig(dropout=0.5))
    randomise(model)
    assert torch.equal(logits(model), logits(model))
    detach(model, "default")


WRONG = [{"rank": 0}, {"rank": 2.5}, {"rank": "8"}, {"alpha": 0}, {"alpha": math.inf}, {"alpha": math.nan}]
WRONG += [{"dropout": 1.0}, {"dropout": -0.1}, {"variant": "lara"}, {"bias": "some"}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_invalid_settings_are_refused_by_name(wrong: dict) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=f"^lora_{name}={value!r}: must be "):
        variant_of(LoRAConfig(**wrong))
