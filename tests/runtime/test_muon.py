"""Muon against torch's own, and what else an optimizer here must do: skip on the device, resume exactly."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_steps import BAD_GRADIENT, BAD_LOSS, CPU, Fp16, Tiny, batch, same, stepper, weights

from lora.optim import make_optimizer
from runtime.training.batch import Batch
from runtime.training.muon import Muon, MuonSettings, orthogonal
from runtime.training.resume import State, restore, to_files
from runtime.training.steps import NonFiniteError, Stepper
from tests.tiny import tiny

SHAPES = ((24, 24), (24, 24), (48, 24), (24, 48), (24, 7), (7, 24), (1, 24))


def muon(model: Tiny) -> Muon:
    """Muon for the matrices, AdamW for the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() == 2], "own": True, "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1]},
    ]
    return Muon(groups, (0.9, 0.99), torch.float32)


def fresh(**changes) -> Stepper:
    model = Tiny()
    return stepper(model, muon(model), **changes)


def moments(one: Stepper) -> dict[str, torch.Tensor]:
    state = one.optimizer.state
    return {f"{i}/{key}": value.clone() for i, p in enumerate(one.parameters) for key, value in state[p].items()}


def test_an_update_is_that_of_torchs_own_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape) / 5) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon([{"params": ours, "own": True, "lr": 0.02, "weight_decay": 0.1}], (0.9, 0.99), torch.bfloat16)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(8):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=2e-3 * 0.02 * 8)  # sums in bf16, in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_brought_near_1(dtype):
    torch.manual_seed(0)
    matrices = [torch.randn(shape) * scale for scale in (1e-4, 1.0, 1e4) for shape in ((24, 48), (48, 24))]
    for matrix, found in zip(matrices, orthogonal(matrices, dtype), strict=True):
        assert found.shape == matrix.shape and found.dtype == matrix.dtype
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        sizes = (U.T @ found @ Vh.T).diagonal()
        assert ((sizes > 0.5) & (sizes < 1.5)).all(), "in the directions of the matrix itself"
    assert not orthogonal([torch.zeros(3, 5)], dtype)[0].any()


@pytest.mark.parametrize("bad", [BAD_LOSS, BAD_GRADIENT])
@pytest.mark.parametrize("machine", [CPU, Fp16(CPU.device, CPU.dtype)], ids=["fp32", "scaled"])
def test_an_update_with_what_is_not_finite_is_skipped_and_all_after_it(bad, machine):
    def spoilt(step: int) -> Batch:
        good = batch(step)
        return Batch(good.tokens.clone().index_fill_(1, torch.tensor([0]), bad), good.targets) if step == 2 else good

    one = fresh(batch=spoilt, machine=machine)
    for step in range(2):
        one.step(step)
    before = weights(one) | moments(one)
    for step in range(2, 5):
        one.step(step)
        if machine is CPU or bad == BAD_LOSS:
            assert same(weights(one) | moments(one), before)
        else:  # a scaler skips what overflows, and goes on
            assert (step == 2) == same(weights(one) | moments(one), before)
    if machine is CPU or bad == BAD_LOSS:
        with pytest.raises(NonFiniteError, match="step 2"):
            one.read_loss()


@pytest.mark.parametrize("cut", range(4))
def test_a_resumed_run_is_the_run_that_was_not_stopped(cut):
    whole, first, again = fresh(), fresh(), fresh()
    for step in range(5):
        whole.step(step)
    for step in range(cut):
        first.step(step)
    restore(again, to_files(first, State(step=cut)), "here")
    for step in range(cut, 5):
        again.step(step)
    assert same(weights(whole) | moments(whole), weights(again) | moments(again))


@pytest.mark.parametrize("lora", [False, True])
def test_muon_takes_the_matrices_inside_the_blocks(lora):
    model = tiny(bias=True, **({"use_lora": True} if lora else {}))
    optimizer = make_optimizer(model, (0.9, 0.99), 0.1, 4.0, MuonSettings(3.0, torch.float32))
    how = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert how.keys() == {p for p in model.parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = name.startswith("blocks.") and p.dim() == 2
            assert how[p]["own"] == inside and math.isclose(how[p]["weight_decay"], 0.1 if p.dim() == 2 else 0.0)
            assert how[p]["lr_scale"] == (3.0 if inside else 4.0 if ".B" in name else 1.0)
