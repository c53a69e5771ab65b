"""The transformer against its own definition in float64, and what it counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora.attach import activate, attach, detach
from lora.config import LoRAConfig
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from tests.tiny import tiny

IDX = torch.arange(24).reshape(2, 12) * 7 % 50
TARGETS = torch.arange(24).reshape(2, 12) * 11 % 50


def reference(weights: dict[str, Tensor], idx: Tensor, n_head: int, n_layer: int) -> Tensor:
    """Pre-norm GPT logits (B, T, V) in float64, one position at a time, straight from the equations."""
    w = {name: t.detach().double() for name, t in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["token_embedding.weight"][idx] + w["position_embedding.weight"][: idx.shape[1]]
    for block in (f"blocks.{i}" for i in range(n_layer)):
        q, k, v = (linear(norm(x, f"{block}.norm_1"), f"{block}.attention.{name}_proj") for name in "qkv")
        mixed, width = torch.zeros_like(x), x.shape[-1] // n_head
        for at in range(0, x.shape[-1], width):
            head = slice(at, at + width)
            for t in range(x.shape[1]):
                scores = (k[:, : t + 1, head] @ q[:, t, head, None])[..., 0] / math.sqrt(width)
                chances = scores.exp() / scores.exp().sum(-1, keepdim=True)
                mixed[:, t, head] = (chances[..., None] * v[:, : t + 1, head]).sum(1)
        x = x + linear(mixed, f"{block}.attention.o_proj")
        inner = linear(norm(x, f"{block}.norm_2"), f"{block}.mlp.up_proj")
        x = x + linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), f"{block}.mlp.down_proj")
    return linear(norm(x, "norm"), "lm_head")


@pytest.mark.parametrize(
    ("changes", "length"),
    [({}, 12), ({"bias": True}, 16), ({"n_head": 1}, 5), ({"n_head": 32}, 1), ({"n_layer": 1, "vocab_size": 77}, 16)],
)
def test_logits_and_loss_are_those_of_the_equations(changes: dict, length: int) -> None:
    model = tiny(**changes)
    idx, targets = (torch.arange(2 * length).reshape(2, length) * step % 50 for step in (7, 11))
    expected = reference(model.state_dict(), idx, model.config.n_head, model.config.n_layer)
    loss = -expected.log_softmax(-1).gather(-1, targets[..., None]).mean()
    for exact in (False, True):
        logits, found = (model.double() if exact else model)(idx, targets)
        assert torch.allclose(logits.double(), expected, rtol=0, atol=1e-12 if exact else 1e-5)
        assert abs(found.item() - loss.item()) < 1e-6
        assert (found.dtype, found.shape) == (torch.float32, ())
        alone, nothing = model(idx)
        assert nothing is None
        assert torch.equal(alone, logits)


def test_no_logit_depends_on_a_later_token() -> None:
    model = tiny()
    before = model(IDX)[0]
    for t in range(IDX.shape[1]):
        changed = IDX.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        after = model(changed)[0]
        assert torch.allclose(after[:, :t], before[:, :t], atol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model = tiny()
    for row in range(2):
        assert torch.allclose(model(IDX[row : row + 1])[0], model(IDX)[0][row : row + 1], atol=1e-6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="17 positions, but block_size is 16"):
        tiny()(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="n_embd=32 is not a multiple of n_head=5"):
        tiny(n_head=5)


def test_dropout_follows_mode_and_seed() -> None:
    model, plain = tiny(dropout=0.3), tiny()
    assert torch.equal(model.eval()(IDX)[0], plain(IDX)[0])
    model.train()
    outputs = [torch.manual_seed(seed) and model(IDX)[0] for seed in (1, 1, 2)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("bias", [False, True])
def test_under_the_users_autocast_the_products_run_in_bf16_and_the_loss_in_fp32(bias: bool) -> None:
    model = tiny(bias=bias)
    expected = model(IDX, TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(IDX, TARGETS)
    loss.backward()
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert (logits.float() - expected[0]).norm() < 0.02 * expected[0].norm()
    assert abs(loss - expected[1]) < 0.02
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())


def test_fresh_weights_have_the_deviations_of_gpt2() -> None:
    torch.manual_seed(0)
    model = BigramLanguageModelLoRA(500, 64, 64, n_head=4, n_layer=8, bias=True)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p) if "norm" in name and "weight" in name else torch.zeros_like(p))
        else:
            wanted = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
            assert 0.95 < p.std() / wanted < 1.05
            assert abs(p.mean()) < 0.1 * wanted
    assert abs(model(torch.arange(64)[None], torch.arange(64)[None])[1] - math.log(500)) < 0.1


CONFIGS = [
    LoRAConfig(rank=4, targets=targets, bias=bias, train_embeddings=embeddings)
    for targets, bias, embeddings in (
        ("all", "none", True), ("minimal", "none", False), ("standard", "all", True), ("minimal", "lora_only", False),
    )
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.targets}-{c.bias}-{c.train_embeddings}")
def test_the_groups_of_parameters_add_up(config: LoRAConfig) -> None:
    model = tiny(bias=config.bias != "none")
    base = sum(p.numel() for p in model.parameters())
    full = model.get_parameter_info()
    embeddings = (50 + 16) * 32
    assert full == {
        "total": base, "trainable": base, "frozen": 0, "lora": 0, "embedding": embeddings, "lora_percentage": 0.0,
    }  # fmt: skip
    attach(model, config)
    info = model.get_parameter_info()
    wide = {"minimal": 2 * 2 * 64, "standard": 2 * 4 * 64, "all": 2 * (4 * 64 + 2 * 160) + 82}[config.targets]
    biases = {"none": 0, "lora_only": 2 * 2 * 32, "all": 2 * (6 * 32 + 4 * 32 + 32) + 32 + 50}[config.bias]
    assert info["lora"] == 4 * wide + biases
    assert info["embedding"] == embeddings * config.train_embeddings
    assert info["frozen"] == base
    assert info["trainable"] == info["lora"] + info["embedding"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )  # fmt: skip
    for change in (lambda: None, lambda: activate(model), lambda: attach(model, LoRAConfig(), "other")):
        change()
        info = model.get_parameter_info()
        assert info["total"] == sum(p.numel() for p in model.parameters())
        assert info["lora"] + info["embedding"] + info["frozen"] == info["total"]
        assert info["lora_percentage"] == pytest.approx(100 * info["lora"] / info["total"])
    for name in ("default", "other"):
        detach(model, name)
    assert model.get_parameter_info()["total"] == base


def test_the_constructors_settings_reach_the_adapter() -> None:
    options = {"rank": 3, "alpha": 5.0, "dropout": 0.25, "targets": "minimal", "variant": "rslora", "bias": "lora_only"}
    options = {f"lora_{name}": value for name, value in options.items()} | {"lora_train_embeddings": False}
    model = BigramLanguageModelLoRA(50, 32, 16, "cpu", 0.1, 4, 2, True, True, **options)
    entry = model.blocks[0].attention.q_proj.lora["default"]
    assert entry.config == LoRAConfig(3, 5.0, 0.25, "minimal", "rslora", "lora_only", False)
    assert entry.scale == 5 / math.sqrt(3)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * 3
