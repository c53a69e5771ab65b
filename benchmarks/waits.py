"""How often the host waits for the device in a training step, by torch's profile."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peaks import row
from runtime.console import say
from runtime.training.steps import Stepper

# What a profile calls waiting for the device, with CUDA and with ROCm, and copying, which may wait too.
WAITS, COPIES = r"(cuda|cu|hip)(Device|Stream|Event|Ctx)Synchronize|(cuda|hip)Memcpy", r"(cuda|hip)MemcpyAsync"
MARK = "what is counted"

Calls = list[tuple[str, float]]  # the name of each, and its milliseconds


def calls_of(take: Callable[[], object]) -> Calls:
    """What the host does inside `take`. Before and after that the profiler itself waits for the device."""
    with torch.profiler.profile() as profile, torch.profiler.record_function(MARK):
        take()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    mark = next(event.time_range for event in events if event.name == MARK)
    inside = [event for event in events if mark.start <= event.time_range.start <= mark.end and event.name != MARK]
    return [(event.name, event.time_range.elapsed_us() / 1e3) for event in inside]


def row_of_waits(what: str, take: Callable[[], object], steps: int, stepper: Stepper) -> dict[str, Any] | None:
    """How often the host waits in a step; `take` takes so many `steps` of the stepper. A copy from memory that is not
    pinned may wait under a name of its own, so the longest is told. None, which is said, where a profile does not even
    show that a loss is read."""
    calls, with_reading = calls_of(take), calls_of(lambda: (take(), stepper.read_loss()))
    waits, more = ([name for name, _ in each if re.fullmatch(WAITS, name)] for each in (calls, with_reading))
    if len(more) <= len(waits):
        say(f"{what}: waits of the host are left out, as the profile does not show the one where a loss is read")
        return None
    longest = max((ms for name, ms in calls if re.fullmatch(COPIES, name)), default=0.0)
    which = "".join(f", {name} {count / steps:g}" for name, count in Counter(waits).items())
    found = row(f"{what}, waits of the host a step (longest copy {longest:.2f} ms{which})", len(waits) / steps, 0)
    return found | {"longest_copy_ms": longest}
