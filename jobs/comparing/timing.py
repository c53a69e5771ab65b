"""Calls timed in turn, so that what disturbs the machine disturbs all alike, and the ratio of what they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from lora.optim import after_steps, extra_losses, make_optimizer
from runtime.device import Machine
from runtime.training.batch import Batch
from runtime.training.steps import Schedule, Stepper

RESAMPLES, MOST = 1_000, 1_000  # of the bootstrap; and of the pairs, beyond which every k-th is enough


def repeatable(model: nn.Module, tokens: Tensor, machine: Machine, lora_plus_ratio: float = 1.0) -> Stepper:
    """Training steps that can be taken again and again: on the same tokens, (B, T + 1), at a small learning rate."""
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(machine.device)
    model = model.to(machine.device)
    optimizer = make_optimizer(model, (0.9, 0.99), 0.1, lora_plus_ratio)
    own = {"extra_losses": extra_losses(model), "after_steps": after_steps(model, 1_000)}
    return Stepper(model, optimizer, Schedule(1e-4, 1e-4, 0, 1), lambda step: batch, machine, seed=0, **own)


class Ratio(NamedTuple):
    """A ratio of median times, and the interval in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def below_one(self) -> bool | None:
        """Whether it is below 1; None where that is too noisy to say."""
        return True if self.high < 1 else False if self.low >= 1 else None

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})" if self.low < self.high else f"{self.value:.2f}"


def take_turns(
    calls: Mapping[str, Callable[[], object]], rounds: Iterable[int], machine: Machine
) -> dict[str, list[float]]:
    """Seconds of each call, by name, a call each a round; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i, _ in enumerate(rounds):
        for name, call in calls.items():
            machine.synchronize()
            start = time.perf_counter()
            call()
            machine.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """The median of `one` over that of `other`, whose i-th times were taken in the same round; the interval is a
    bootstrap over rounds (Efron 1979)."""
    times = np.array([one, other])
    value = np.median(times[0]) / np.median(times[1])
    times = times[:, :: max(1, times.shape[1] // MOST)]
    picks = np.random.Generator(np.random.Philox(0)).integers(0, times.shape[1], (RESAMPLES, times.shape[1]))
    medians = np.median(times[:, picks], axis=2)
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return Ratio(float(value), min(float(low), float(value)), max(float(high), float(value)))
