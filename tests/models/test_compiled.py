"""COMPILE=True: the same steps from compiled code, under the same names; one line where nothing can compile."""

from __future__ import annotations

import functools

import pytest
import torch

from lora.attach import attach
from lora.config import LoRAConfig
from lora.optim import make_optimizer
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.device import Machine, check_compiler
from runtime.errors import UserError
from runtime.storage.quantized import FORMS, quantize
from runtime.training.batch import Batch
from runtime.training.resume import State, restore, to_files
from runtime.training.steps import Schedule, Stepper

CPU = Machine(torch.device("cpu"), torch.float32)
TOKENS = torch.arange(2 * 9).reshape(2, 9) % 20


def stepper(compiled: bool, form: str = "none", keeps: str = "none") -> Stepper:
    torch.manual_seed(0)
    model = BigramLanguageModelLoRA(20, 16, 8, n_head=2, n_layer=1)
    for name in model.linears_of_blocks() if form != "none" else ():
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight = torch.nn.Parameter(quantize(form, layer.weight, name), requires_grad=False)
    attach(model, LoRAConfig(2, 4))
    model.checkpoint_activations = keeps
    optimizer = make_optimizer(model, (0.9, 0.99), 0.0)
    batch = Batch(TOKENS[:, :-1], TOKENS[:, 1:])
    return Stepper(model, optimizer, Schedule(1e-2, 1e-2, 0, 9), lambda step: batch, CPU, seed=0, compile=compiled)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_are_the_plain_ones_and_keep_their_names(backend: str, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain, compiled = stepper(False), stepper(True)
    for step in range(3):
        plain.step(step)
        compiled.step(step)
    assert abs(plain.read_loss() - compiled.read_loss()) < 1e-5
    for (name, mine), (other, its) in zip(
        plain.model.named_parameters(), compiled.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.allclose(mine, its, atol=1e-4), name
    saved = to_files(compiled, State(3))
    assert restore(stepper(False), saved, "here").step == 3  # a compiled run's files go on without compiling


@pytest.mark.parametrize("keeps", ["none", "cheap", "block"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_steps_on_weights_in_4_and_8_bits_are_the_plain_ones(form: str, keeps: str, monkeypatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain, compiled = stepper(False, form, keeps), stepper(True, form, keeps)
    for step in range(2):
        plain.step(step)
        compiled.step(step)
    assert compiled.read_loss() == pytest.approx(plain.read_loss(), abs=1e-5)


def test_without_a_compiler_there_is_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="needs a C.. compiler, and there is none: install g"):
        check_compiler(torch.device("cpu"))
