"""What all processes of a command must have in common."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import torch

from runtime.processes.world import world

OWN = ("data_dir",)  # settings that may differ from machine to machine


def check_alike(settings: Mapping[str, Any], machine: str) -> None:
    """Raises UsageError where processes have other settings or versions than the first, or another kind of machine."""
    if world().size > 1:
        values = {name.upper(): value for name, value in settings.items() if name not in OWN}
        values |= {"Python": platform.python_version(), "torch": torch.__version__, "device and dtype": machine}
        world().check_same(values | {"number of threads (OMP_NUM_THREADS)": torch.get_num_threads()})


def check_read_alike(**read: Any) -> None:
    """Raises UsageError where processes have read something else than the first, as from machines with other files."""
    if world().size > 1:
        world().check_same({name: hashlib.sha256(repr(what).encode()).hexdigest()[:12] for name, what in read.items()})
