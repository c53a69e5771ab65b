"""CHECKPOINT_ACTIVATIONS: the same bits with less kept, whatever the model is and trains."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lora.attach import attach
from lora.config import LoRAConfig
from models.config import ModelConfig
from models.transformer import Transformer

LLAMA = {"norm": "rms", "positions": "rotary", "mlp": "gated_silu", "n_inner": 176, "n_kv_head": 2, "qk_norm": True}
SHAPES = {"gpt": {"bias": True}, "llama": LLAMA}
ADAPTERS: dict[str, dict | None] = {
    "full": None,
    "lora": {},
    "dropout": {"dropout": 0.2},
    "dora": {"variant": "dora"},
    "vera": {"variant": "vera"},
    "frozen below": {"targets": "minimal", "train_embeddings": False},
}
WIDTH = 160  # positions: two blocks of queries


def make(shape: str, adapter: str, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(96, n_embd=64, n_head=4, n_layer=3, max_positions=WIDTH, **SHAPES[shape])
    model = Transformer(config, dropout)
    if (about := ADAPTERS[adapter]) is not None:
        attach(model, LoRAConfig(**{"rank": 4, "targets": "all"} | about))
    return model


def batch(rows: int = 3) -> dict[str, Tensor]:
    """Tokens, targets, and two records in each row, which do not see each other."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(96, (rows, WIDTH), generator=generator) for _ in range(2))
    segments = (torch.arange(WIDTH) >= 70).long().expand(rows, -1)
    return {"idx": tokens, "targets": targets, "segments": segments}


def loss_of(model: Transformer, keeps: str, dtype: torch.dtype) -> Tensor:
    device = next(model.parameters()).device.type
    model.checkpoint_activations = keeps
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        return model(**{name: tensor.to(device) for name, tensor in batch().items()})[1]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture
def one_order() -> Iterator[None]:
    """Of what some kernels of a GPU add up in an order that differs from call to call."""
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_the_same_bits(
    shape: str, adapter: str, dropout: float, dtype: torch.dtype, device: str
) -> None:
    model, found = make(shape, adapter, dropout).to(device), {}
    for keeps in ("none", "cheap", "block"):
        loss = loss_of(model, keeps, dtype)
        loss.backward()
        found[keeps] = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    for keeps in ("cheap", "block"):
        assert all(torch.equal(a, b) for a, b in zip(found["none"], found[keeps], strict=True)), keeps
    learns = [name for name, p in model.named_parameters() if p.requires_grad and p.grad.abs().sum() > 0]
    assert any(".B" in name or ".b" in name or adapter == "full" for name in learns)  # also where nothing below trains


def bytes_kept(model: Transformer, keeps: str) -> int:
    """What a forward pass leaves behind for the backward pass, as torch's profiler counts it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = loss_of(model, keeps, torch.bfloat16)
    found = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    loss.backward()
    return found


@pytest.mark.parametrize("adapter", ["full", "lora", "dropout"])
@pytest.mark.parametrize("shape", SHAPES)
def test_less_is_kept(shape: str, adapter: str) -> None:
    model = make(shape, adapter)
    none, cheap, block = (bytes_kept(model, keeps) for keeps in ("none", "cheap", "block"))
    assert cheap < 0.7 * none
    assert block < 0.35 * none


def test_what_is_below_the_first_adapter_has_no_graph() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(96, n_embd=64, n_head=4, n_layer=3, max_positions=WIDTH))
    attach(model, LoRAConfig(rank=4, targets=r"re:blocks\.1\..*", train_embeddings=False))
    found: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: found.append(output.requires_grad))
    for keeps in ("none", "cheap"):
        model.checkpoint_activations = keeps
        model(**batch())
    assert found == 2 * [False, True, True]
