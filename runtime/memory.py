"""How much memory is free where a run computes."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from runtime.device import Machine

CGROUPS = Path("/sys/fs/cgroup")


def free_memory(machine: Machine) -> int | None:
    """The bytes that this process may still take: on the device for CUDA; on the CPU of Linux what the system has
    available, or less where a container's limit leaves less. None where nobody tells."""
    if machine.is_cuda:
        return torch.cuda.mem_get_info(machine.device)[0]
    if machine.device.type != "cpu" or sys.platform != "linux":
        return None
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    limits = [left for folder in _cgroups() if (left := left_in_cgroup(folder)) is not None]
    return min([int(available[1]) * 1024] * bool(available) + limits, default=None)


def _cgroups() -> list[Path]:
    """The folders that tell of this process's control groups: its own, those above, and what a container sees."""
    found = [CGROUPS, CGROUPS / "memory"]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                own = CGROUPS / controllers / path.lstrip("/")
                found += [own, *(parent for parent in own.parents if CGROUPS in parent.parents)]
    return found


def left_in_cgroup(folder: Path) -> int | None:
    """The bytes that a control group, of either version, may still take; None where it has no limit. Pages of files
    that nobody works with are given back when memory gets short, and do not count as taken."""
    for limit, usage, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such file; "max"
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            given_back = re.search(rf"^{idle} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            return max(0, left + (int(given_back[1]) if given_back else 0))
    return None
