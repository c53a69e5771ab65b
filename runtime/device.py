"""Which device and which compute dtype a run uses, and what depends on nothing else."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from runtime.errors import UserError
from runtime.start import python_command

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """A device, the dtype its matmuls run in, and one line for each choice that needs a reason."""

    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    def autocast(self) -> torch.autocast:
        """Matmuls in the compute dtype; parameters stay fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler that works in fp16 on CUDA and passes everything through elsewhere."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16 and self.is_cuda)

    @property
    def is_cuda(self) -> bool:
        """Whether this is an NVIDIA (or ROCm) GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked to; needed around clocks."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def peak_memory(self) -> int | None:
        """The most bytes this process has held so far: on the device for CUDA, resident for the CPU; else None."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu" or sys.platform == "win32":
            return None
        if sys.platform == "linux":  # getrusage would count what the process that started this one held
            return _resident("VmHWM")
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def restart_peak_memory(self) -> int | None:
        """Forget the peak so far, where the system allows it; returns the bytes that are held now, or None."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        if self.device.type != "cpu" or sys.platform != "linux":
            return self.peak_memory()
        with suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # some containers forbid it
            file.write("5")
        return _resident("VmRSS")

    def __str__(self) -> str:
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return f"{torch.cuda.get_device_name(self.device) if self.is_cuda else self.device.type}, {name}"


def _resident(key: str) -> int:
    """A size out of Linux's account of this process, in bytes."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def machine_name() -> str:
    """The processor, the number of threads and the versions that a figure needs beside it."""
    name, about = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if about.exists() and (found := re.search(r"model name\s*: (.*)", about.read_text())):
        name = found[1]
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    return f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}"


def cpu_has_bf16() -> bool:
    """Whether bf16 matmuls are fast on this CPU: 4 to 6 times fp32 with AVX512_BF16 or AMX, slower without."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def _inductor_config() -> ModuleType:
    """What torch.compile's code generator will use; importing it takes seconds, so only where it is asked for."""
    return importlib.import_module("torch._inductor.config")


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile would find nothing to compile with, before a run has started."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError(
                f"COMPILE=True on a GPU needs Triton: {python_command()} -m pip install triton, or set COMPILE=False"
            )
    elif not any(map(shutil.which, filter(None, _inductor_config().cpp.cxx))):
        raise UserError("COMPILE=True needs a C++ compiler, and there is none: install g++ or clang, or COMPILE=False")


def _pick_device(wanted: str) -> tuple[torch.device, list[str]]:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(kind for kind, works in there.items() if works)), []
    kind, _, index = wanted.partition(":")
    if not there[kind]:
        none = f"warning: DEVICE={wanted}: torch {torch.__version__} sees no such device; using the CPU"
        return torch.device("cpu"), [none]
    if index and kind == "cuda" and int(index) >= torch.cuda.device_count():
        return torch.device("cuda"), [f"DEVICE={wanted}: there are {torch.cuda.device_count()} GPUs; using the first"]
    return torch.device(wanted), []


def existing_device(wanted: str | torch.device) -> torch.device:
    """This device, as torch names it, or the one that DEVICE=auto takes. Raises UserError where there is none such."""
    if wanted == "auto":
        return _pick_device(wanted)[0]
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"device={str(wanted)!r} cannot be used here, with torch {torch.__version__}; 'cpu' can"
        ) from None
    return torch.device(wanted)


def _auto_dtype(device: torch.device) -> tuple[str, list[str]]:
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", []) if fast else ("fp16", ["DTYPE=auto: this GPU has no bf16; using fp16 with a GradScaler"])
    if device.type == "mps":
        return "fp32", ["DTYPE=auto: fp32 on MPS, where there is no GradScaler for fp16"]
    return ("bf16", []) if cpu_has_bf16() else ("fp32", ["DTYPE=auto: this CPU has no bf16 instructions; using fp32"])


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that a step frees, for the next step to take.

    By default it hands them back to the system, and a full step of 3.2M parameters then takes 37,000 page faults
    instead of 140: 10 to 20 % of its time on a 2-core CPU. Elsewhere than on glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold, large, largest_of_old = -3, -1, 2**30, 2**25
        libc = ctypes.CDLL(None)
        # An old glibc refuses more than 32 MiB, and with one threshold set no longer raises the other from 128 KiB.
        _ = libc.mallopt(mmap_threshold, large) or libc.mallopt(mmap_threshold, largest_of_old)
        libc.mallopt(trim_threshold, large)


def give_back_freed_memory() -> None:
    """Let glibc hand large blocks back to the system as soon as they are freed, which undoes `keep_freed_memory`.

    A model in pieces (SHARD) makes and forgets each of its matrices in every step, between activations that stay, and
    the heap would be full of holes: two processes with a LoRA step of 85M parameters grew to 2.1 GB each in four steps,
    with this they stay at 1.0, and take half as long again (measured by hand).
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold, small = -3, -1, 2**20
        libc = ctypes.CDLL(None)
        _ = libc.mallopt(mmap_threshold, small) and libc.mallopt(trim_threshold, small)


def pick_machine(device: str, dtype: str) -> Machine:
    """The machine for the DEVICE and DTYPE settings; what cannot be had falls back, with a note that says why."""
    where, notes = _pick_device(device)
    if dtype == "auto":
        dtype, more = _auto_dtype(where)
        notes += more
    if where.type == "cpu":
        keep_freed_memory()
    if dtype == "fp16" and where.type == "cpu":
        dtype = "fp32"
        notes.append("DTYPE=fp16: the CPU has no fast fp16; using fp32")
    if dtype == "fp16" and where.type == "mps":
        notes.append("DTYPE=fp16: MPS has no GradScaler, so small gradients may vanish")
    return Machine(where, DTYPES[dtype], tuple(notes))
