"""Groups of processes that wait for orders, so that cases with different numbers of processes can take turns.

A group that nobody asks waits for a line on its standard input, and takes no time from the others.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.contest import SIZES
from lora.attach import adapter_parameters
from lora.optim import make_optimizer
from runtime.device import Machine, pick_machine
from runtime.errors import UserError
from runtime.processes.command import run_command
from runtime.processes.launch import NEEDED
from runtime.processes.shards import shard
from runtime.processes.world import world
from runtime.training.batch import Batch
from runtime.training.muon import MuonSettings
from runtime.training.steps import Schedule, Stepper

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # how long one process waits for another
WARM, REPEATS = 3, 9  # calls of a collective that do not count, and that do


@dataclass(frozen=True)
class Training:
    """Steps of one of our SIZES. kind: full, lora, or frozen, which is LoRA without its embeddings. way: how the
    processes share a step, one of WAYS."""

    kind: str
    optimizer: str
    way: str
    parts: int
    size: str
    tokens: int
    dtype: str


WAYS = ("exact", "fast", "sharded")  # REDUCE, or SHARD


class Group:
    """Processes that work together, of so many threads each. A context manager, which ends them."""

    def __init__(self, processes: int, threads: int, device: str) -> None:
        self.processes, self.threads = processes, threads
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the processes
        environ = {name: value for name, value in os.environ.items() if name not in NEEDED}
        environ |= {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
        port = free_port()
        self.members = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.workers", device],
                cwd=ROOT,
                env=environ | (self._launch(rank, port) if processes > 1 else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
            for rank in range(processes)
        ]

    def _launch(self, rank: int, port: int) -> dict[str, str]:
        """What torchrun would set."""
        values = (rank, self.processes, rank, self.processes, "127.0.0.1", port)
        return {name: str(value) for name, value in zip(NEEDED, values, strict=True)}

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.kill()
        for member in self.members:
            member.communicate()
        self.errors.close()

    def ask(self, order: str, **about: Any) -> Any:
        """Let all do what is asked; what the first of them answers. Raises UserError where one fails."""
        try:
            for member in self.members:
                print(json.dumps({"order": order} | about), file=member.stdin, flush=True)
            line = self.members[0].stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            for member in self.members:
                member.wait()
            self.errors.seek(0)
            told = self.errors.read().strip() or "no message"
            raise UserError(f"{self} ended: {told.splitlines()[-1]}")
        return json.loads(line)

    def __str__(self) -> str:
        counts = (self.processes, "process"), (self.threads, "thread")
        words = [f"{count} {word}{('es' if word[-1] == 's' else 's') if count > 1 else ''}" for count, word in counts]
        return " of ".join(words)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Worker:
    """One process of a group: what it does when it is asked."""

    def __init__(self, device: str) -> None:
        self.device = device
        world().join(SECONDS, pick_machine(device, "auto").device)
        tiny = Training("lora", "adamw", "exact", world().size, "tiny", 16 * world().size, "auto")
        self._stepper(tiny)[0].step(0)  # loads what torch loads at a first step
        self.before = self._machine("auto").restart_peak_memory()
        self.steppers: dict[Training, tuple[Stepper, Machine]] = {}

    def _machine(self, dtype: str) -> Machine:
        return pick_machine(self.device, dtype)

    def _stepper(self, training: Training) -> tuple[Stepper, Machine]:
        machine, size = self._machine(training.dtype), SIZES[training.size]
        torch.manual_seed(0)
        model = peers.ours(size, training.kind != "full", training.kind == "lora").to(machine.device)
        reduce = training.way
        if training.way == "sharded":
            shard(model, model.blocks, adapter_parameters(model), machine.device)
            reduce = "sharded" if training.kind == "full" else "exact"
        rows = torch.randint(size[0], (training.tokens // size[-1], size[-1] + 1))
        batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).to(machine.device)
        muon = MuonSettings(4.0, machine.dtype) if training.optimizer == "muon" else training.optimizer
        optimizer = make_optimizer(model, (0.9, 0.99), 0.1, kind=muon)
        schedule, how = Schedule(1e-4, 1e-4, 0, 1), {"seed": 0, "parts": training.parts, "reduce": reduce}
        return Stepper(model, optimizer, schedule, lambda _: batch, machine, **how), machine

    def _known(self, about: dict[str, Any]) -> tuple[Stepper, Machine]:
        training = Training(**about)
        if training not in self.steppers:
            self.steppers[training] = self._stepper(training)
        return self.steppers[training]

    def steps(self, training: dict[str, Any], count: int) -> dict[str, Any]:
        """Take so many steps as the training loop does, which on a CPU reads each loss and asks whether to stop.

        Answers the seconds of one and the bytes that a process sent in it, each the most of all processes, and how
        many weights train.
        """
        (stepper, machine), sent = self._known(training), world().sent
        machine.synchronize()
        world().barrier()
        start = time.perf_counter()
        for i in range(count):
            stepper.step(i)
            stepper.read_loss()
            world().highest(0)
        machine.synchronize()
        found = world().gather([time.perf_counter() - start, world().sent - sent])
        seconds, sent = (max(each) / count for each in zip(*found, strict=True))
        weights = sum(p.numel() for p in stepper.parameters)
        return {"seconds": seconds, "sent": sent, "weights": weights}

    def reduction(self, training: dict[str, Any]) -> float:
        """The seconds in which a step's gradients are added up over the processes, once all have theirs."""
        stepper, machine = self._known(training)
        finish, seconds = stepper.reduction.finish, 0.0

        def clocked() -> Any:
            nonlocal seconds
            machine.synchronize()
            world().barrier()
            start = time.perf_counter()
            loss = finish()
            machine.synchronize()
            seconds = time.perf_counter() - start
            return loss

        stepper.reduction.finish = clocked
        stepper.step(0)
        del stepper.reduction.finish
        return max(world().gather(seconds))

    def sweep(self, lengths: list[int]) -> list[dict[str, Any]]:
        """How long a vector of so many fp32 values takes to be added up, in order and not, in medians."""
        machine, rows = self._machine("auto"), []
        for length in lengths:
            vector = torch.zeros(length, device=machine.device)
            for way, add in (("exact", world().add_up_in_order), ("fast", world().add_up)):
                times = [self._once(machine, add, vector) for _ in range(WARM + REPEATS)][WARM:]
                rows.append({"way": way, "values": length, "seconds": statistics.median(times), "all": times})
        return rows

    def _once(self, machine: Machine, add: Callable[[torch.Tensor], object], vector: torch.Tensor) -> float:
        machine.synchronize()
        world().barrier()
        start = time.perf_counter()
        add(vector)
        machine.synchronize()
        return max(world().gather(time.perf_counter() - start))

    def peak(self) -> int | None:
        """The most bytes that a process has held since it was asked for something first; None where nothing tells."""
        after = self._machine("auto").peak_memory()
        found = world().gather(None if after is None or self.before is None else after - self.before)
        return None if None in found else max(found)


def asked(training: Training) -> dict[str, Any]:
    """A training as an order has it."""
    return asdict(training)


def main() -> None:
    """Do what the lines on standard input say, and answer each with a line."""
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        about = json.loads(line)
        print(json.dumps(getattr(worker, about.pop("order"))(**about)), flush=True)


if __name__ == "__main__":
    run_command(main, many=True)
