"""The processes that work on one command: how they agree, wait for each other and add up tensors.

Alone unless `connect` finds that torchrun started several. What travels between them beside tensors is JSON, never
pickles. Collectives on the CPU go by gloo, those on GPUs by NCCL.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import UsageError, UserError
from runtime.processes.launch import Launch, launch_of

START_SECONDS = 300  # how long processes wait for each other to be started
TELL_SECONDS = 20  # how long a process that fails waits for the one that says why

Item = TypeVar("Item")
Step = Callable[[int], None]


class LostProcessError(UserError):
    """Another process ended, or did not answer in time, while this one waited for it."""


class ElsewhereError(UserError):
    """What went wrong on the first process, on the others, which have waited for it."""

    def __init__(self, message: str, status: int, label: str) -> None:
        super().__init__(message)
        self.status, self.label = status, label


class World:
    """The processes of a command, seen from one of them.

    sent: bytes of tensors that this one has sent to others. in_step: whether a model is in pieces, so that all must go
    through it equally often.
    """

    def __init__(self, launch: Launch, store: dist.Store | None = None) -> None:
        self.launch, self.store = launch, store
        self.rank, self.size, self.sent = launch.rank, launch.size, 0
        self.seconds, self.failing, self.in_step = START_SECONDS, False, False
        self.parent = os.getppid()

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    @property
    def abandoned(self) -> int:
        """SIGTERM where torchrun is gone, which would have ended the other processes when one fails, else 0."""
        return signal.SIGTERM if self.launch.torchrun and os.getppid() != self.parent else 0

    def join(self, seconds: float, device: torch.device) -> None:
        """Make collectives possible, which wait at most `seconds` for each other. Raises UsageError where this device
        cannot have them."""
        if self.size == 1 or dist.is_initialized():
            return
        self.seconds = seconds
        backend = self._backend(device)
        with self._plain_errors():
            dist.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.size, timeout=timedelta(seconds=seconds)
            )
            self.barrier()
        signal.signal(signal.SIGTERM, self._terminated)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """End at once, but for a process that is about to say why it fails: torchrun ends all as soon as one has."""
        if not self.failing:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _backend(self, device: torch.device) -> str:
        if not dist.is_gloo_available():
            raise UsageError("this build of torch has no gloo, by which processes talk; start one process only")
        if device.type == "cpu":
            return "gloo"
        if device.type != "cuda":
            raise UsageError(f"several processes cannot work on {device.type}: set DEVICE=cpu, or start one only")
        if not dist.is_nccl_available():
            raise UsageError("this build of torch has no NCCL, by which GPUs talk; set DEVICE=cpu")
        if device.index is not None:
            raise UsageError(f"DEVICE={device} with several processes: leave the number out, as each takes its own GPU")
        there, wanted = torch.cuda.device_count(), self.launch.local_size
        if there < wanted:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            among = "" if shown is None else f", as CUDA_VISIBLE_DEVICES={shown} has it"
            raise UsageError(f"{wanted} processes on this machine need a GPU each, and there are {there}{among}")
        torch.cuda.set_device(self.launch.local_rank)
        return "cpu:gloo,cuda:nccl"

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if lost := self.lost(error):
                raise lost from None
            raise

    def lost(self, error: Exception) -> LostProcessError | None:
        """What to say of an error where it comes of another process that is gone, else None."""
        if isinstance(error, LostProcessError):
            return error
        text = str(error)
        ours = isinstance(error, dist.DistError) or re.search(r"gloo|nccl|connection (closed|reset)", text, re.I)
        if self.size == 1 or not ours:
            return None
        self.failing = True
        if re.search(r"timed? ?out", text, re.I):
            return LostProcessError(f"another process has not answered for COLLECTIVE_TIMEOUT={self.seconds:g} seconds")
        return LostProcessError("lost another process, which was killed or failed, or whose network is gone")

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.highest(0)

    def highest(self, number: int) -> int:
        """The highest of the numbers that the processes have."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        with self._plain_errors():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, which JSON must be able to write, in their order."""
        if self.size == 1:
            return [value]
        written = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest = self.highest(len(written))
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
        padded[: len(written)] = written
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        with self._plain_errors():
            dist.all_gather(rows, padded)
        return [json.loads(row.numpy().tobytes()) for row in rows]

    def first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on the first process, on all of them: something that JSON can write. Its UserError is
        raised on all."""
        if self.size == 1:
            return make()
        outcome, failed = {}, None
        if self.leads:
            try:
                outcome = {"value": make()}
            except UserError as error:
                failed = error
                outcome = {"message": str(error), "status": error.status, "label": error.label}
        outcome = self.gather(outcome)[0]
        if failed:
            raise failed
        if "value" not in outcome:
            raise ElsewhereError(**outcome)
        return outcome["value"]

    @contextmanager
    def holding(self, held: AbstractContextManager) -> Iterator[None]:
        """Enter a context on the first process alone, while the others wait for it."""
        with ExitStack() as stack:
            self.first(lambda: stack.enter_context(held) and None)
            yield

    @contextmanager
    def machine_by_machine(self) -> Iterator[None]:
        """One process of each machine first, then its others: what that one downloads and caches is there for them."""
        waits = self.launch.local_rank > 0
        if waits:
            self.barrier()
        yield
        if not waits:
            self.barrier()

    def check_same(self, values: dict[str, Any]) -> None:
        """Raises UsageError where processes have different values of something that must be the same."""
        everywhere = self.gather(values)
        for name, value in everywhere[0].items():
            for rank, theirs in enumerate(everywhere):
                if theirs.get(name) != value:
                    raise UsageError(
                        f"processes 0 and {rank} must have the same {name}, and have {value} and {theirs.get(name)}"
                    )

    def mine(self, count: int) -> range:
        """Which of so many things in a row are this process's to do: a run of them, all equally long where they can
        be."""
        return self._share(self.rank, count)

    def _share(self, rank: int, count: int) -> range:
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def all_rows(self, mine: Tensor, count: int) -> Tensor:
        """All of `count` rows (count, ...), of which this process has made those that are its to make."""
        if self.size == 1:
            return mine
        most = -(-count // self.size)
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        rows = padded.new_empty(self.size * most, *mine.shape[1:])
        with self._plain_errors():
            dist.all_gather_into_tensor(rows, padded)
        self.sent += (self.size - 1) * padded.nbytes
        return torch.cat([rows[rank * most :][: len(self._share(rank, count))] for rank in range(self.size)])

    def mine_in_step(self, count: int) -> list[int | None]:
        """The same; where all processes must do equally much, with None for what is to be done to no purpose."""
        mine: list[int | None] = list(self.mine(count))
        return mine + [None] * (-(-count // self.size) - len(mine) if self.in_step else 0)

    def shared_out(
        self,
        items: Sequence[Item],
        make: Callable[[Item, Step], Any],
        tell: Callable[[int, int], None] = lambda done, total: None,
        steps: int = 1,
    ) -> list[Any]:
        """What `make` makes of each item, which JSON must be able to write, on all processes and in the items' order.

        The processes take items in turn, so that those that lie together, and often take about as long, are not one
        process's. make(item, step): step(n) says that n of the item's `steps` are done. tell(done, total) is told of
        the steps of this process's items.
        """
        mine, made = items[self.rank :: self.size], []
        for i, item in enumerate(mine):

            def step(done: int, before: int = i * steps) -> None:
                if done < steps:  # the last is told below, also where there was less to do
                    tell(before + done, len(mine) * steps)

            made.append(make(item, step))
            tell((i + 1) * steps, len(mine) * steps)
        everywhere = self.gather(made)
        return [everywhere[i % self.size][i // self.size] for i in range(len(items))]

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in whatever order is the fastest, in place."""
        if self.size > 1:
            with self._plain_errors():
                dist.all_reduce(tensor)
            self.sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        return tensor

    def add_up_in_order(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a vector, in place, added up in a balanced tree: ((0 + 1) + (2 + 3)) + ...

        All get the same bits. Halves are exchanged and added, then the sums are given back, so that each process sends
        2 (size - 1) / size of the vector, as in a ring (Rabenseifner 2004, "Optimization of Collective Reduction
        Operations"). The number of processes must be a power of two.
        """
        start, end, spans, distance = 0, len(tensor), [], 1
        while distance < self.size:
            middle, upper = (start + end) // 2, bool(self.rank & distance)
            spans.append((distance, start, middle, end))
            kept, given = ((middle, end), (start, middle))[:: 1 if upper else -1]
            received = torch.empty_like(tensor[slice(*kept)])
            self._exchange(tensor[slice(*given)], received, self.rank ^ distance)
            tensor[slice(*kept)] += received
            (start, end), distance = kept, 2 * distance
        for distance, start, middle, end in reversed(spans):
            kept, wanted = ((middle, end), (start, middle))[:: 1 if self.rank & distance else -1]
            self._exchange(tensor[slice(*kept)], tensor[slice(*wanted)], self.rank ^ distance)
        return tensor

    def _exchange(self, given: Tensor, received: Tensor, other: int) -> None:
        with self._plain_errors():
            ways = [dist.P2POp(dist.isend, given, other), dist.P2POp(dist.irecv, received, other)]
            for work in dist.batch_isend_irecv(ways):
                work.wait()
        self.sent += given.nbytes

    def speaks(self) -> bool:
        """Whether this process is the first of all that have something to say at their end; the others wait until it
        is said."""
        self.failing = True
        if not self.store:
            return self.leads
        with suppress(RuntimeError):
            if first := self.store.add(f"spoken/{self.launch.restart}", 1) == 1:
                return first
            with suppress(RuntimeError):
                self.store.wait([f"said/{self.launch.restart}"], timedelta(seconds=TELL_SECONDS))
            return False
        return self.rank == (0 if self.launch.torchrun else 1)  # the store went with torchrun, or with the first

    def said(self) -> None:
        """Let the processes end that wait for what this one had to say."""
        if self.store:
            with suppress(RuntimeError):
                self.store.set(f"said/{self.launch.restart}", "yes")

    def leave(self) -> None:
        """End the collectives, together."""
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


_current = World(Launch())


def world() -> World:
    """The processes that this one belongs to."""
    return _current


def connect() -> World:
    """Find the other processes, if torchrun started any. Raises UsageError for an environment that tells half of it,
    UserError where they cannot be reached."""
    global _current
    launch = launch_of(os.environ)
    if launch.size > 1:
        if not dist.is_available():
            raise UsageError("this build of torch cannot work with several processes; start one only")
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            taken = "the port is in use" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
            raise UserError(f"the processes cannot meet at {where}: {taken}; choose another --master-port") from None
        _current = World(launch, store)
    return _current
