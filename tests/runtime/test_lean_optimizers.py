"""AdamW with moments in 8 bits, and in pages: as good as AdamW, skipped on the device, resumed exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from test_steps import MACHINES, NoReading, Unwatched, spoilt
from tiny_steps import BAD_GRADIENT, BAD_LOSS, CPU, Tiny, adamw, same, stepper, weights
from torch import Tensor, nn

from lora.attach import attach
from lora.config import LoRAConfig
from lora.optim import check_optimizer, make_optimizer
from runtime.errors import UsageError
from runtime.storage.folders import CorruptedError
from runtime.storage.tensors import pack, unpack
from runtime.training import adamw8bit, paged_adamw
from runtime.training.adamw8bit import AdamW8bit
from runtime.training.batch import Batch
from runtime.training.paged_adamw import PagedAdamW
from runtime.training.resume import OPTIMIZER, State, restore, to_files
from runtime.training.steps import NonFiniteError, Schedule, Stepper
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[2]
BETAS, RATE = (0.9, 0.99), 1e-3
WIDTH = 400  # of matrices of 4,400 values, which are no whole number of blocks; the vectors stay in 32 bits


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """So that the matrices here are updated in five chunks."""
    monkeypatch.setattr(adamw8bit, "CHUNK", 1024)


def eight_bits(model: nn.Module) -> AdamW8bit:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() == dim], "weight_decay": 0.1 * (dim == 2)} for dim in (1, 2)]
    return AdamW8bit(groups, BETAS)


def fresh(cls: type[Tiny] = Tiny, **changes) -> Stepper:
    model = cls(width=WIDTH)
    return stepper(model, eight_bits(model), **changes)


def kept(one: Stepper) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter."""
    names = {p: name for name, p in one.model.named_parameters()}
    return {f"{names[p]}/{key}": t for p, state in one.optimizer.state.items() for key, t in state.items()}


def descend(kind: str, spread: float, device: str = "cpu") -> tuple[Tensor, float]:
    """Where 300 steps take 4,400 values whose gradients are noise, 0 half of the time, and differ by a factor of up to
    10^spread; and the longest way that a value went in one step, in learning rates."""
    sizes = 10 ** (-spread * torch.rand(11 * WIDTH, generator=torch.Generator().manual_seed(0)))
    p, generator, longest = nn.Parameter(torch.zeros(sizes.shape, device=device)), torch.Generator().manual_seed(1), 0.0
    about = {"lr": RATE, "betas": BETAS, "weight_decay": 0.0}
    if kind == "adamw8bit":
        optimizer = AdamW8bit([{"params": [p], **about}], BETAS)
    else:
        optimizer = {"adamw": torch.optim.AdamW, "theirs": bitsandbytes.optim.AdamW8bit}[kind]([p], **about)
    for step in range(300):
        gradient = sizes * torch.randn(sizes.shape, generator=generator)
        p.grad = (gradient * (torch.rand(sizes.shape, generator=generator) < 0.5)).to(device)
        before = p.detach().clone()
        optimizer.step()
        if step > 20:
            longest = max(longest, (p - before).abs().max().item() / RATE)
    return p.detach(), longest


@pytest.mark.parametrize("spread", [0.0, 2.0, 4.0])
def test_it_goes_where_adamw_goes_and_bitsandbytes_own_less_so(spread):
    expected, _ = descend("adamw", spread)
    (ours, longest), (theirs, _) = descend("adamw8bit", spread), descend("theirs", spread)
    far = [((found - expected).norm() / expected.norm()).item() for found in (ours, theirs)]
    assert far[0] < 0.03 + 0.05 * spread and longest < 2.5
    assert far[0] < (0.6 * far[1] if spread else 1.1 * far[1])


def test_an_update_by_chunks_is_that_of_the_whole(monkeypatch):
    by_chunks, _ = descend("adamw8bit", 2.0)
    monkeypatch.setattr(adamw8bit, "CHUNK", 2**20)
    assert torch.equal(by_chunks, descend("adamw8bit", 2.0)[0])


def test_a_weight_without_gradient_stays_where_it_is():
    p = nn.Parameter(torch.ones(5000))
    optimizer = AdamW8bit([{"params": [p], "lr": 1.0, "weight_decay": 0.0}], BETAS)
    for step in range(20):
        p.grad = torch.randn(5000, generator=torch.Generator().manual_seed(step))
        p.grad[::3] = 0
        optimizer.step()
    assert (p[::3] == 1).all() and (p[1::3] != 1).all()


def test_moments_take_a_quarter_and_those_of_small_tensors_stay_in_32_bits():
    one, other = fresh(), stepper(Tiny(width=WIDTH))
    for each in (one, other):
        each.step(0)
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        if p.requires_grad:
            states = one.optimizer.state[p], other.optimizer.state[q]
            ours, theirs = (sum(tensor.nbytes for tensor in state.values()) for state in states)
            assert 0.25 < ours / theirs < 0.26 if p.dim() == 2 else ours == theirs


def counting(step: int) -> Batch:
    """Rows that count by sevens, from anywhere."""
    starts = torch.randint(0, 50, (8, 1), generator=torch.Generator().manual_seed(step))
    tokens = (starts + 7 * torch.arange(13)) % 50
    return Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("lora", [False, True])
def test_it_learns_what_adamw_learns(lora):
    losses = []
    for kind in ("adamw", "adamw8bit"):
        model = tiny(n_embd=64, noise=0.05)
        if lora:
            attach(model, LoRAConfig(rank=64, targets="all-linear", train_embeddings=False))
        optimizer = make_optimizer(model, BETAS, 0.1, 1.0, kind)
        one = Stepper(model, optimizer, Schedule(2e-3, 2e-3, 5, 99), counting, CPU, seed=0)
        for step in range(60):
            one.step(step)
        losses.append(one.read_loss())
    in_8_bits = [p.numel() for p, state in optimizer.state.items() if state["exp_avg"].dtype == torch.uint8]
    assert sum(in_8_bits) > 0.9 * sum(p.numel() for p in one.parameters)
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[0] < 2


@pytest.mark.parametrize("bad", [BAD_LOSS, BAD_GRADIENT])
@pytest.mark.parametrize("machine", MACHINES, ids=["plain", "scaler"])
@pytest.mark.parametrize("first", [0, 3])
def test_an_update_with_what_is_not_finite_is_skipped_and_all_after_it(bad, machine, first):
    one = fresh(batch=spoilt(bad, first), machine=machine)
    for step in range(first):
        one.step(step)
    before = weights(one)
    for step in range(first, first + 4):
        one.step(step)
        after = weights(one)
        unchanged = same(before, {name: after[name] for name in before})
        unchanged = unchanged and not any(after[name].any() for name in after.keys() - before.keys())
        goes_on = machine is not CPU and bad == BAD_GRADIENT  # a scaler skips what overflows
        assert unchanged != (goes_on and step > first), step
    if not goes_on:
        with pytest.raises(NonFiniteError, match=f"step {first}"):
            one.read_loss()


class Wide(Unwatched):
    """A model with large matrices that reads nothing from the device."""


@pytest.mark.parametrize("machine", MACHINES, ids=["plain", "scaler"])
def test_a_step_never_waits_for_the_device(machine):
    one = fresh(Wide, machine=machine)
    with NoReading():
        one.step(0)
        one.step(1)


@pytest.mark.parametrize("cut", range(4))
@pytest.mark.parametrize("machine", MACHINES, ids=["plain", "scaler"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(cut, machine):
    whole, first, again = (fresh(machine=machine) for _ in range(3))
    for step in range(5):
        whole.step(step)
    for step in range(cut):
        first.step(step)
    restore(again, to_files(first, State(step=cut)), "here")
    assert same(weights(again), weights(first))
    for step in range(cut, 5):
        again.step(step)
    assert same(weights(whole), weights(again))


def shorter(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight/exp_avg_scale"] = tensors["head.weight/exp_avg_scale"][:-1]


def in_32_bits(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight/exp_avg"] = tensors["head.weight/exp_avg"].float()


@pytest.mark.parametrize("change", [shorter, in_32_bits, lambda tensors: tensors.pop("head.weight/exp_avg_scale")])
def test_moments_that_do_not_fit_are_refused_before_anything_is_touched(change):
    one, other = fresh(), fresh()
    one.step(0)
    files = to_files(one, State(step=1))
    tensors = unpack(files[OPTIMIZER], "")
    change(tensors)
    before = weights(other)
    with pytest.raises(CorruptedError, match=r"here/optimizer.*'head.weight/exp_avg") as caught:
        restore(other, files | {OPTIMIZER: pack(tensors)}, "here")
    assert str(caught.value).isprintable() and same(before, weights(other))
    other.step(0)
    assert same(weights(one), weights(other)), "it can still start from the beginning"


def test_one_optimizers_moments_are_not_anothers():
    one = fresh()
    one.step(0)
    with pytest.raises(CorruptedError, match="does not fit what this run trains"):
        restore(stepper(Tiny(width=WIDTH)), to_files(one, State(step=1)), "here")


@pytest.fixture
def pages(monkeypatch) -> list[nn.Parameter]:
    """Stands for memory that a GPU shares with its host; the parameters whose moments are there."""
    asked = []
    monkeypatch.setattr(paged_adamw, "paged_zeros", lambda p: asked.append(p) or torch.zeros_like(p))
    monkeypatch.setattr(paged_adamw, "SMALLEST", adamw8bit.SMALLEST)
    return asked


def test_paged_moments_are_adamws_elsewhere_and_stay_there_when_a_run_goes_on(pages):
    def paged() -> Stepper:
        model = Tiny(width=WIDTH)
        return stepper(model, PagedAdamW(adamw(model).param_groups, BETAS))

    plain = stepper(Tiny(width=WIDTH))
    one, again = paged(), paged()
    for step in range(3):
        plain.step(step)
        one.step(step)
    assert same(weights(one), weights(plain))
    assert pages == [p for p in one.parameters for _ in range(2) if p.dim() == 2]
    restore(again, to_files(one, State(step=3)), "here")
    assert len(pages) == 8 and same(weights(again), weights(plain))


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
def test_a_gpu_goes_where_adamw_goes():
    expected, _ = descend("adamw", 2.0)
    ours, longest = descend("adamw8bit", 2.0, "cuda")
    assert (ours.cpu() - expected).norm() < 0.13 * expected.norm() and longest < 2.5


@gpu
def test_a_gpu_reads_and_writes_pages_as_its_own_memory():
    p = torch.zeros(400, 300, device="cuda")
    zeros = paged_adamw.paged_zeros(p)
    assert zeros.shape == p.shape and zeros.dtype == p.dtype and zeros.device == p.device and not zeros.any()
    zeros += torch.arange(300.0, device="cuda")
    assert torch.equal(zeros.cpu(), torch.arange(300.0).expand(400, 300))


@pytest.mark.parametrize(
    ("name", "device", "told"),
    [
        ("paged_adamw", "cpu", "works on cuda only, and this run is on cpu; use adamw or adamw8bit there"),
        ("paged_adamw", "mps", "works on cuda only, and this run is on mps; use adamw there"),
        ("adamw8bit", "mps", "works on cpu and cuda only, and this run is on mps; use adamw there"),
    ],
)
def test_a_device_that_it_does_not_work_on_is_told(name, device, told):
    with pytest.raises(UsageError, match=f"^OPTIMIZER={name} {told}$"):
        check_optimizer(name, torch.device(device))


@pytest.mark.parametrize(
    ("name", "device"), [("adamw8bit", "cpu"), ("adamw8bit", "cuda"), ("paged_adamw", "cuda"), ("muon", "mps")]
)
def test_a_device_that_it_works_on_is_fine(name, device):
    check_optimizer(name, torch.device(device))


def test_neither_an_update_nor_reading_tensors_imports_torchs_compiler() -> None:
    code = (
        "import sys, torch; from runtime.training.adamw import AdamW; p = torch.nn.Parameter(torch.ones(2, 2)); "
        "optimizer = AdamW([p]); p.grad = torch.ones(2, 2); optimizer.step(); optimizer.zero_grad(); "
        "optimizer.load_state_dict(optimizer.state_dict()); "
        "from runtime.storage.tensors import pack, unpack; unpack(pack({'a': p.data}), 'file'); "
        "sys.exit(', '.join({'torch._dynamo', 'sympy'} & sys.modules.keys()) or 0)"
    )
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode
