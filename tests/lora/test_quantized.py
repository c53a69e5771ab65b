"""Frozen weights in 4 and 8 bits: what they hold, what a step on them computes and keeps, and what else works on them.

The reference is the same model with the dequantised values in dense weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_lora import IDX, TARGETS, randomise, trained
from torch import nn

from lora.attach import activate, attach
from lora.config import LoRAConfig
from lora.merge import merge, merged
from lora.variants.registry import VARIANTS
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.files import dequantize
from models.generation.choosing import Sampling
from models.generation.sampling import generate
from runtime.errors import UserError
from runtime.extras import bitsandbytes
from runtime.storage.quantized import FORMS, Quantized, quantize
from tests.tiny import tiny

DTYPES = (torch.float32, torch.bfloat16)
CONFIGS = [*({"variant": variant} for variant in VARIANTS), {"dropout": 0.3}, {"targets": "minimal"}, {"bias": "all"}]


def pair(form: str, config: dict, dtype: torch.dtype = torch.float32) -> list[BigramLanguageModelLoRA]:
    """A model on weights in 4 or 8 bits with an adapter, and the same on dense weights of the same values."""
    small = tiny(bias=True).to(dtype)
    for name in small.linears_of_blocks():
        path, _, leaf = name.rpartition(".")
        layer = small.get_submodule(path)
        setattr(layer, leaf, nn.Parameter(quantize(form, layer.weight, name), requires_grad=False))
    dense = copy.deepcopy(small)
    dequantize(dense)
    for model in (small, dense):
        torch.manual_seed(1)
        attach(model, LoRAConfig(**{"rank": 4, "targets": "all"} | config))
        randomise(model)
    return [small, dense]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_has_the_bits_that_bitsandbytes_makes_of_the_whole_matrix(dtype: torch.dtype) -> None:
    W = torch.randn(700, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    W[3] = 0
    ours = quantize("nf4", W, "W")
    data, state = bitsandbytes().quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = {"weight": data} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    assert ours.parts.keys() == theirs.keys()
    assert all(torch.equal(part, theirs[name]) for name, part in ours.parts.items())
    assert torch.equal(ours.dense(), bitsandbytes().dequantize_4bit(data, state))
    assert ours.stored_bytes < 0.52 * W.numel() + 2000


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_matrix_is_a_tensor_that_cannot_change(form: str) -> None:
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    made, x = quantize(form, W, "W"), torch.randn(5, 64)
    assert (made.shape, made.dtype) == (W.shape, W.dtype)
    assert (made.dense() - W).norm() < {"nf4": 0.1, "int8": 0.01}[form] * W.norm()
    assert torch.equal(x @ made.t(), x @ made.dense().t())
    assert torch.equal(made.to(torch.bfloat16), made.dense(torch.bfloat16))
    assert torch.equal(copy.deepcopy(nn.Parameter(made, requires_grad=False)), made.dense())
    with pytest.raises(TypeError, match=f"^a matrix in {form} cannot be changed$"):
        made.add_(1)


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_on_a_device_is_in_the_same_form(form: str) -> None:
    made = quantize(form, torch.randn(48, 64), "W")
    # What `to(device)` asks for: torch names the dtype too.
    copied = torch.ops.aten._to_copy(made, dtype=made.dtype, layout=torch.strided, device=torch.device("cpu"))
    assert type(copied) is type(made) and torch.equal(copied.dense(), made.dense())


def test_a_layer_is_moved_with_all_parts_of_its_weight() -> None:
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(quantize("int8", layer.weight, "W"), requires_grad=False)
    layer.to("meta")
    assert isinstance(layer.weight, Quantized) and {part.device.type for part in layer.weight.parts.values()} == {
        "meta"
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_moved_to_a_gpu_and_back_in_its_form(form: str) -> None:
    small, _ = pair(form, {})
    names = {name for name, p in small.named_parameters() if isinstance(p, Quantized)}
    with torch.no_grad():
        wanted = small(IDX)[0]
    for device in ("cuda", "cpu"):
        small.to(device)
        weights = {name: p for name, p in small.named_parameters() if isinstance(p, Quantized)}
        assert weights.keys() == names
        assert {part.device.type for p in weights.values() for part in p.parts.values()} == {device}
        with torch.no_grad():
            assert torch.allclose(small(IDX.to(device))[0].cpu(), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "spoil", "told"),
    [
        ("nf4", lambda W: W[:3, :5], "W has 15 values, which do not divide into blocks of 64 for nf4"),
        ("nf4", lambda W: W * torch.nan, "W has values that are not finite, or too large"),
        ("int8", lambda W: W / 0, "W has values that are not finite, or too large"),
        ("int8", lambda W: W * 1e6, "W has values that are not finite, or too large"),
    ],
)
def test_what_cannot_be_quantised_is_refused(form: str, spoil, told: str) -> None:
    with pytest.raises(UserError, match=f"^{told}"):
        quantize(form, spoil(torch.ones(64, 64)), "W")


def step(model: BigramLanguageModelLoRA, compute: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a training step."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        loss = model.train()(IDX, TARGETS)[1]
    loss.backward()
    return loss, {name: p.grad for name, p in trained(model).items()}


@pytest.mark.parametrize("keeps", ["none", "cheap", "block"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_that_of_the_dequantised_weights(
    form: str, config: dict, compute: torch.dtype, stored: torch.dtype, keeps: str
) -> None:
    small, dense = pair(form, config, stored)
    small.checkpoint_activations = keeps
    (loss, found), (expected_loss, expected) = (step(model, compute) for model in (small, dense))
    rel = 1e-5 if compute == torch.float32 else 4e-2
    assert loss.item() == pytest.approx(expected_loss.item(), rel=rel)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= rel * grad.norm() + 1e-7, name


@pytest.mark.parametrize("keeps", ["none", "cheap"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_dense_weight_is_kept_for_the_backward_pass(config: dict, keeps: str) -> None:
    small, _ = pair("nf4", config)
    small.checkpoint_activations = keeps
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block = small.blocks[0]
        block.mlp(torch.randn(2, 7, 32, requires_grad=True))
        block.attention(torch.randn(2, 7, 32, requires_grad=True))
    shapes = {tuple(sorted(layer.shape)) for layer in block.modules() if hasattr(layer, "dense_weight")}
    shapes |= {(32, 96)}  # q, k and v as one
    assert any(isinstance(tensor, Quantized) for tensor in saved)
    assert not [t.shape for t in saved if not isinstance(t, Quantized) and tuple(sorted(t.shape)) in shapes]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [{}, {"variant": "dora"}, {"variant": "vera"}], ids=str)
def test_generation_merging_and_the_plain_base_are_those_of_the_dequantised_weights(form: str, config: dict) -> None:
    small, dense = pair(form, config)
    prompts = [[1, 2, 3], [4, 5]]
    for model in (small, dense):
        model.eval()
    wanted = generate(dense, prompts, 12, Sampling(greedy=True), 0)
    assert generate(small, prompts, 12, Sampling(greedy=True), 0) == wanted
    before = {name: p for name, p in small.named_parameters() if isinstance(p, Quantized)}
    with merged(small):
        assert generate(small, prompts, 12, Sampling(greedy=True), 0) == wanted
    assert all(small.get_parameter(name) is p for name, p in before.items())
    activate(small)
    activate(dense)
    assert torch.allclose(small(IDX)[0], dense(IDX)[0], atol=1e-5)
    activate(small, {"default": 0.5})
    activate(dense, {"default": 0.5})
    assert torch.allclose(small(IDX)[0], dense(IDX)[0], atol=1e-4)
    merge(small)
    merge(dense)
    assert torch.allclose(small(IDX)[0], dense(IDX)[0], atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_with_a_scaler_trains_on_nf4() -> None:
    from jobs.comparing.timing import repeatable
    from runtime.device import pick_machine

    small, _ = pair("nf4", {})
    stepper = repeatable(small, torch.cat((IDX, TARGETS[:, -1:]), 1), pick_machine("cuda", "fp16"))
    losses = []
    for i in range(20):
        stepper.step(i)
        losses.append(stepper.read_loss())
    assert losses[-1] < losses[0]
