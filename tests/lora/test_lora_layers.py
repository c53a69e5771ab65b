"""Without adapters the layers equal torch's, and no stale or saved copy of a frozen weight exists."""

from __future__ import annotations

import copy
import io
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from tiny_lora import IDX, TARGETS, adapted, logits, randomise, same, state, tiny
from torch import nn

from lora import functional
from lora.attach import activate, attach, base_tensors
from lora.config import LoRAConfig
from lora.layers.linear import LoRALinear, fused_projection
from lora.layers.others import LoRAEmbedding, LoRALayerNorm
from lora.merge import cached_weights, merged
from lora.optim import make_optimizer
from lora.variants.registry import VARIANTS

ROWS = torch.linspace(-2, 2, 3 * 5 * 8).reshape(3, 5, 8)
IDS = torch.arange(10).reshape(2, 5)
LAYERS = [
    (LoRALinear, nn.Linear, (8, 6), {}, ROWS),
    (LoRALinear, nn.Linear, (8, 6), {"bias": False}, ROWS),
    (LoRALinear, nn.Linear, (8, 6), {}, ROWS[0, 0]),
    (LoRALinear, nn.Linear, (8, 6), {}, ROWS[:0]),
    (LoRAEmbedding, nn.Embedding, (10, 8), {}, IDS),
    (LoRAEmbedding, nn.Embedding, (10, 8), {"padding_idx": 3}, IDS),
    (LoRAEmbedding, nn.Embedding, (10, 8), {"max_norm": 0.5}, IDS),
    (LoRAEmbedding, nn.Embedding, (10, 8), {"scale_grad_by_freq": True}, IDS % 4),
    (LoRALayerNorm, nn.LayerNorm, (8,), {}, ROWS),
    (LoRALayerNorm, nn.LayerNorm, (8,), {"bias": False}, ROWS),
    (LoRALayerNorm, nn.LayerNorm, ((5, 8),), {"elementwise_affine": False}, ROWS),
]


def run(layer: nn.Module, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    """The output, and the gradients of the parameters."""
    with torch.autocast("cpu", enabled=autocast):
        y = layer(x)
    weights = list(layer.parameters())
    return [y, *(torch.autograd.grad(y.float().square().sum(), weights) if weights else [])]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("ours", "torchs", "args", "options", "x"), LAYERS)
def test_a_layer_without_adapters_is_torchs_own(ours, torchs, args, options, x, autocast) -> None:
    layers, after = [], []
    for cls in (ours, torchs):
        torch.manual_seed(3)
        layers.append(cls(*args, **options))
        after.append(torch.rand(4))
    assert isinstance(layers[0], torchs)
    assert torch.equal(*after)
    assert same(*(layer.state_dict() for layer in layers))
    for mine, its in zip(*(run(layer, x, autocast) for layer in layers), strict=True):
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)
    for layer in layers:
        layer.requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        outputs = [layer(x) for layer in layers]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("x", [ROWS, ROWS[0, 0], ROWS[:0], ROWS[:, :0]], ids=lambda x: str(tuple(x.shape)))
def test_an_adapted_linear_accepts_every_shape_that_a_linear_accepts(x: torch.Tensor) -> None:
    layer, plain = nn.Sequential(LoRALinear(8, 6)), nn.Linear(8, 6)
    plain.load_state_dict(layer[0].state_dict())
    attach(layer, LoRAConfig(targets="0"))
    assert torch.allclose(layer(x), plain(x), atol=1e-6)
    layer(x).sum().backward()


def test_a_base_has_the_same_keys_and_weights_with_and_without_lora() -> None:
    models = []
    for use_lora in (False, True):
        torch.manual_seed(7)
        models.append(type(tiny())(50, 32, 16, n_head=4, n_layer=2, use_lora=use_lora))
    assert not any("lora" in key for key in models[0].state_dict())
    assert same(models[0].state_dict(), base_tensors(models[1]))
    assert torch.equal(logits(models[0]), logits(models[1]))  # a fresh adapter changes nothing


def bf16(model: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu"):
        return logits(model)


def other_weights() -> dict[str, torch.Tensor]:
    return tiny(seed=9).state_dict()


def load_into(model: nn.Module) -> None:
    model.load_state_dict(other_weights(), strict=False)


def assign_twice(model: nn.Module) -> None:
    for seed in (8, 9):
        model.load_state_dict(tiny(seed=seed).state_dict(), strict=False, assign=True)
    model.requires_grad_(False)


def copy_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in base_tensors(model).items():
            p.copy_(other_weights()[name])


def write_through_data(model: nn.Module) -> None:
    """Write as PEFT merges, which does not raise the version counter."""
    for name, p in base_tensors(model).items():
        p.data.copy_(other_weights()[name])


def replace_data_twice(model: nn.Module) -> None:
    """Replace twice: the second is likely to get the memory that the first has freed."""
    for seed in (8, 9):
        for name, t in tiny(seed=seed).state_dict().items():
            model.get_parameter(name).data = t.clone()


def train_whole(model: nn.Module) -> None:
    """Unfreeze, train with an optimizer that does not raise the version counter, and freeze again."""
    active = model.lm_head.active
    activate(model)
    model.requires_grad_(True)
    optimizer = make_optimizer(model, (0.9, 0.95), 0.1)
    for _ in range(2):
        with torch.autocast("cpu"):
            model(IDX, TARGETS)[1].backward()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        optimizer.zero_grad()
    activate(model, *active)


def merge_and_back(model: nn.Module) -> None:
    with merged(model):
        bf16(model)


def there_and_back(model: nn.Module) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def through_double(model: nn.Module) -> None:
    model.double()
    logits(model)
    model.float()


CHANGES = [load_into, assign_twice, copy_in_place, write_through_data, replace_data_twice, train_whole]
CHANGES += [merge_and_back, there_and_back, through_double]


@pytest.mark.parametrize("config", [None, LoRAConfig(targets="minimal")], ids=["plain", "adapted"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_frozen_weight_that_changed_is_converted_again(change: Callable, config: LoRAConfig | None) -> None:
    model = adapted(config) if config else tiny().requires_grad_(False)
    for _ in range(2):  # the second time, a cache would be used
        before = bf16(model)
    change(model)
    fresh = tiny(seed=5)
    if config:
        attach(fresh, config)
    fresh.load_state_dict(model.state_dict())
    fresh.requires_grad_(False)
    assert torch.equal(bf16(model), bf16(fresh))
    assert torch.equal(bf16(model), before) == (change in (merge_and_back, through_double))


def test_a_copied_model_shares_nothing_with_the_original() -> None:
    model = adapted(LoRAConfig(targets="minimal"))
    before = bf16(model)
    twin = copy.deepcopy(model)
    assert torch.equal(bf16(twin), before)
    load_into(twin)
    assert not torch.equal(bf16(twin), before)
    assert torch.equal(bf16(model), before)


def test_no_converted_weight_is_saved() -> None:
    model = tiny().requires_grad_(False)
    keys, sizes = list(model.state_dict()), []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(file.tell())
        bf16(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_buffers()] == []
    assert sizes[0] == sizes[1]


def test_a_model_that_moves_leaves_no_memory_behind() -> None:
    model = tiny().requires_grad_(False)
    bf16(model)
    memory = weakref.ref(model.lm_head.weight.untyped_storage())
    assert memory() is not None
    model.to(torch.float16)
    assert memory() is None


class Int8Linear(LoRALinear):
    """A linear whose frozen weight is stored in 8 bits, with a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.bias, self.weight = linear.bias, None
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.codes.to(dtype) * self.scale.to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_subclass_may_store_the_frozen_weight_otherwise(variant: str) -> None:
    stored, plain = tiny(bias=True), tiny(bias=True)
    for path, layer in list(stored.named_modules()):
        if isinstance(layer, LoRALinear):
            parent, _, name = path.rpartition(".")
            setattr(stored.get_submodule(parent), name, Int8Linear(layer))
            with torch.no_grad():
                plain.get_submodule(path).weight.copy_(stored.get_submodule(path).dense_weight())
    for model in (stored, plain):
        torch.manual_seed(1)
        attach(model, LoRAConfig(rank=4, variant=variant, bias="all"))
        randomise(model)
        model(IDX, TARGETS)[1].backward()
    assert torch.allclose(logits(stored), logits(plain), atol=1e-5)
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in (stored, plain)]
    for mine, its in zip(*gradients, strict=True):
        assert torch.allclose(mine, its, rtol=1e-3, atol=1e-6)
    for model in (stored, plain):
        activate(model, {"default": 0.5})
    assert torch.allclose(logits(stored), logits(plain), atol=1e-5)
    with cached_weights(stored):
        assert torch.allclose(logits(stored), logits(plain), atol=1e-5)
    assert torch.allclose(bf16(stored), bf16(plain), atol=0.1)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_works_after_a_pass_in_inference_mode(autocast: bool) -> None:
    model = adapted(LoRAConfig(targets="all"))
    with torch.inference_mode(), torch.autocast("cpu", enabled=autocast):
        model(IDX)
    with torch.autocast("cpu", enabled=autocast):
        model(IDX, TARGETS)[1].backward()
    before = state(model)
    optimizer = make_optimizer(model, (0.9, 0.95), 0.1)
    optimizer.step()
    assert not same(state(model), before)


@pytest.mark.parametrize("config", [None, LoRAConfig(rank=4)])
def test_a_fused_projection_equals_its_linears_and_runs_their_hooks(config: LoRAConfig | None) -> None:
    model, seen = (adapted(config) if config else tiny()).train(), []
    attention = model.blocks[0].attention
    layers, x = (attention.q_proj, attention.k_proj, attention.v_proj), torch.randn(2, 5, 32)
    for _ in range(2):
        for y, layer in zip(fused_projection(layers, x), layers, strict=True):
            assert torch.allclose(y, layer(x), atol=1e-5)
        attention.k_proj.register_forward_hook(lambda *_: seen.append("k"))
    assert seen == ["k", "k"]


def test_a_fused_projection_shares_one_dropout_mask() -> None:
    model = adapted(LoRAConfig(rank=4, dropout=0.3)).train()
    attention, x = model.blocks[0].attention, torch.randn(2, 5, 32)
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    q, *others = fused_projection(layers, x)
    assert not torch.allclose(q, layers[0](x), atol=1e-3)
    for y in others:
        assert torch.equal(y, q)


def test_a_wrapper_around_a_linear_is_called() -> None:
    class Doubled(LoRALinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = tiny()
    before, attention = logits(model), model.blocks[0].attention
    layer = Doubled(32, 32, bias=False)
    layer.load_state_dict(attention.q_proj.state_dict())
    attention.q_proj = layer
    assert not torch.allclose(logits(model), before, atol=1e-2)


def test_a_fused_projection_may_have_different_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "MIN_SAVED", -math.inf)
    model = adapted(LoRAConfig(rank=2, targets="q_proj", train_embeddings=False), name="one")
    attach(model, LoRAConfig(rank=2, variant="dora", targets="k_proj,v_proj", train_embeddings=False), "two")
    randomise(model)
    activate(model, "one", "two")
    attention, x = model.blocks[0].attention, torch.randn(2, 5, 32)
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    for y, layer in zip(fused_projection(layers, x), layers, strict=True):
        assert torch.allclose(y, nn.functional.linear(x, layer.effective_weight()), atol=1e-5)


@pytest.mark.parametrize("saved", [math.inf, -math.inf], ids=["from the weight", "from the tokens"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapted_model_compiles_to_one_graph(variant: str, saved: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "MIN_SAVED", saved)
    torch._dynamo.reset()
    model = adapted(LoRAConfig(rank=2, variant=variant, bias="all"), bias=True, n_layer=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(IDX, TARGETS)[1], model(IDX, TARGETS)[1])
