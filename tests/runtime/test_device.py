"""Which device and dtype are picked, and what a person is told where it is not what was asked for."""

from __future__ import annotations

import ctypes
import platform
import sys
import warnings
from pathlib import Path

import pytest
import torch

from runtime import device
from runtime.device import DTYPES, Machine, cpu_has_bf16, keep_freed_memory, pick_machine

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.fixture
def there(monkeypatch):
    """Sets what the machine seems to have: none of it, unless it is named."""

    def has(cuda: int = 0, mps: bool = False, gpu_bf16: bool = False, cpu_bf16: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(device, "cpu_has_bf16", lambda: cpu_bf16)

    has()
    return has


# what there is, DEVICE, DTYPE -> device, dtype, what the notes tell
CHOICES = [
    ({}, "auto", "fp32", CPU, "fp32", []),
    ({"mps": True}, "auto", "fp32", MPS, "fp32", []),
    ({"cuda": 1, "mps": True}, "auto", "fp32", CUDA, "fp32", []),
    ({"cuda": 1, "mps": True}, "cpu", "fp32", CPU, "fp32", []),
    ({"cuda": 1, "mps": True}, "mps", "fp32", MPS, "fp32", []),
    ({"cuda": 2}, "cuda:1", "fp32", torch.device("cuda:1"), "fp32", []),
    ({"cuda": 2}, "cuda:2", "fp32", CUDA, "fp32", ["DEVICE=cuda:2: there are 2 GPUs"]),
    ({}, "cuda", "fp32", CPU, "fp32", ["DEVICE=cuda: "]),
    ({}, "cuda:1", "fp32", CPU, "fp32", ["DEVICE=cuda:1: "]),
    ({"cuda": 1}, "mps", "fp32", CPU, "fp32", ["DEVICE=mps: "]),
    ({"cpu_bf16": True}, "cpu", "auto", CPU, "bf16", []),
    ({}, "cpu", "auto", CPU, "fp32", ["DTYPE=auto: this CPU has no bf16"]),
    ({}, "cuda", "auto", CPU, "fp32", ["DEVICE=cuda: ", "DTYPE=auto: this CPU has no bf16"]),
    ({"cuda": 1, "gpu_bf16": True}, "auto", "auto", CUDA, "bf16", []),
    ({"cuda": 1, "cpu_bf16": True}, "auto", "auto", CUDA, "fp16", ["DTYPE=auto: this GPU has no bf16"]),
    ({"mps": True, "cpu_bf16": True}, "auto", "auto", MPS, "fp32", ["no GradScaler"]),
    ({"mps": True}, "auto", "fp16", MPS, "fp16", ["MPS has no GradScaler"]),
    ({"mps": True}, "auto", "bf16", MPS, "bf16", []),
    ({"cuda": 1}, "auto", "fp16", CUDA, "fp16", []),
    ({"cuda": 1}, "auto", "bf16", CUDA, "bf16", []),
    ({"cpu_bf16": True}, "cpu", "fp16", CPU, "fp32", ["DTYPE=fp16: the CPU"]),
    ({}, "cuda", "fp16", CPU, "fp32", ["DEVICE=cuda: ", "DTYPE=fp16: the CPU"]),
    ({}, "cpu", "bf16", CPU, "bf16", []),
]


@pytest.mark.parametrize(("has", "wanted", "dtype", "where", "gets", "told"), CHOICES)
def test_what_cannot_be_had_falls_back_with_a_line(there, has, wanted, dtype, where, gets, told):
    there(**has)
    machine = pick_machine(wanted, dtype)
    assert (machine.device, machine.dtype) == (where, DTYPES[gets])
    assert len(machine.notes) == len(told), machine.notes
    for note, part in zip(machine.notes, told, strict=True):
        assert part in note and note.isprintable()


def test_a_note_tells_what_is_used_instead(there):
    assert pick_machine("mps", "fp32").notes[0].endswith("using the CPU")
    assert pick_machine("cpu", "auto").notes[0].endswith("using fp32")
    there(cuda=1)
    assert "using fp16 with a GradScaler" in pick_machine("cuda", "auto").notes[0]


@pytest.mark.parametrize("kinds", [(), ("_is_avx512_bf16_supported",), ("_is_amx_tile_supported",)])
def test_bf16_is_fast_with_either_instruction_set(monkeypatch, kinds):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in kinds, raising=False)
    assert cpu_has_bf16() is bool(kinds)


def test_a_torch_without_the_probes_has_no_bf16(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert cpu_has_bf16() is False


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaler_works_in_fp16_on_cuda_and_nowhere_else(monkeypatch, kind, dtype):
    made = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda where, enabled: made.append((where, enabled)))
    Machine(torch.device(kind), DTYPES[dtype]).scaler()
    assert made == [(kind, kind == "cuda" and dtype == "fp16")]


def test_a_disabled_scaler_passes_everything_through():
    for machine in (Machine(CPU, torch.float16), Machine(MPS, torch.float16), Machine(CPU, torch.float32)):
        scaler, loss = machine.scaler(), torch.tensor(1.5)
        assert not scaler.is_enabled() and scaler.scale(loss) is loss and scaler.state_dict() == {}


def test_products_are_in_the_compute_dtype_and_parameters_are_not():
    layer = torch.nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            with Machine(CPU, dtype).autocast():
                assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_a_machine_says_what_it_is(there):
    assert str(Machine(CPU, torch.bfloat16)) == "cpu, bf16" and str(Machine(MPS, torch.float32)) == "mps, fp32"
    assert str(Machine(CUDA, torch.float16)) == "Tesla T4, fp16"


def test_only_an_accelerator_is_waited_for(monkeypatch):
    waited = []
    for kind in ("cpu", "cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda kind=kind: waited.append(kind))
        Machine(torch.device(kind), torch.float32).synchronize()
    assert waited == ["cuda", "mps"]


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the system does not tell")
def test_peak_memory_is_what_this_process_has_held():
    peak = Machine(CPU, torch.float32).peak_memory()
    assert 50e6 < peak < 1e12, "in bytes: torch alone takes more than 50 MB"
    now = peak_by_status()
    assert now is None or now * 0.8 < peak < now * 1.2
    assert Machine(CPU, torch.float32).peak_memory() >= peak


def peak_by_status() -> int | None:
    """The same figure from another source, on a Linux that has it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def test_peak_memory_is_the_devices_on_cuda_and_unknown_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: 123 if where == CUDA else None)
    assert Machine(CUDA, torch.float32).peak_memory() == 123
    assert Machine(MPS, torch.float32).peak_memory() is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert Machine(CPU, torch.float32).peak_memory() is None


class Libc:
    """A glibc that takes no mmap threshold above `limit`: 32 MiB in old ones."""

    def __init__(self, limit: int) -> None:
        self.limit, self.set = limit, {}

    def mallopt(self, option: int, value: int) -> int:
        if option == -3 and value > self.limit:
            return 0
        self.set[option] = value
        return 1


@pytest.mark.parametrize("limit", [2**25, 2**40])
def test_large_blocks_are_kept_also_by_a_glibc_that_caps_the_threshold(monkeypatch, limit):
    libc = Libc(limit)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    keep_freed_memory()
    # Setting one threshold alone stops glibc from raising the other, which would then stay at 128 KiB.
    assert libc.set == {-3: min(limit, 2**30), -1: 2**30}


def test_other_libraries_are_left_alone(monkeypatch):
    for name in ("", "musl"):
        monkeypatch.setattr(platform, "libc_ver", lambda name=name: (name, ""))
        monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("it was loaded"))
        keep_freed_memory()


def test_keeping_memory_is_for_the_cpu_and_harmless(there, monkeypatch):
    called = []
    keep_freed_memory()
    assert torch.ones(2**20).add(1).sum().item() == 2**21
    monkeypatch.setattr(device, "keep_freed_memory", lambda: called.append(1))
    pick_machine("cpu", "fp32")
    assert called == [1]
    there(cuda=1)
    pick_machine("cuda", "fp32")
    assert called == [1]
