"""How the gradients of a step's parts become that of the step, over the parts of one process and over processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.errors import UsageError
from runtime.processes.world import World


class TreeSum:
    """Adds up rows of tensors, one row at a time, in a balanced tree: ((0 + 1) + (2 + 3)) + ...

    So 2^n rows from a multiple of 2^n on have a sum of their own, which another process may make. It holds a row for
    each bit that is set in their number. Rows that are added are used up.
    """

    def __init__(self) -> None:
        self.sums: list[tuple[int, list[Tensor]]] = []  # how many rows each is the sum of, and the sum

    def add(self, row: list[Tensor]) -> None:
        """One more row."""
        count = 1
        while self.sums and self.sums[-1][0] == count:
            row = self._with_last(row)
            count *= 2
        self.sums.append((count, row))

    def total(self) -> list[Tensor]:
        """The sum of all rows, which are then forgotten."""
        row = self.sums.pop()[1]
        while self.sums:
            row = self._with_last(row)
        return row

    def _with_last(self, row: list[Tensor]) -> list[Tensor]:
        _, before = self.sums.pop()
        torch._foreach_add_(before, row)
        return before


class Exact:
    """Sums in one order, whatever the number of processes: the same step, bit for bit, on machines that are alike."""

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        self.parameters, self.world, self.sums = parameters, world, TreeSum()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that parts go through."""
        return model

    def part(self, last: bool) -> AbstractContextManager:
        """What a part's forward and backward pass are done in."""
        return nullcontext()

    def backward(self, scaled: Tensor, loss: Tensor) -> None:
        """The backward pass of a part. loss: its share of the step's, `scaled`: the same for the backward pass."""
        scaled.backward()
        self.moved = [p for p in self.parameters if p.grad is not None]
        self.sums.add([*(p.grad for p in self.moved), loss.detach()])
        for p in self.moved:
            p.grad = None

    def finish(self) -> Tensor:
        """Give the parameters the gradients of the step; returns its loss."""
        row = self.sums.total()
        if self.world.size > 1:
            row = self._over_processes(row)
        *gradients, loss = row
        for p, gradient in zip(self.moved, gradients, strict=True):
            p.grad = gradient
        return loss

    def _over_processes(self, row: list[Tensor]) -> list[Tensor]:
        summed = list(row)
        for dtype in {t.dtype for t in row}:
            places = [i for i, t in enumerate(row) if t.dtype == dtype]
            vector = self.world.add_up_in_order(torch.cat([row[i].reshape(-1) for i in places]))
            for i, piece in zip(places, vector.split([row[i].numel() for i in places]), strict=True):
                summed[i] = piece.view_as(row[i])
        return summed


class Fast:
    """Sums in whatever order is the fastest: over the parts of a process autograd's, over processes that of all-reduce,
    which goes on while the backward pass does."""

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        self.world, self.loss, self.replicas = world, 0.0, None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that parts go through."""
        if self.world.size == 1:
            return model
        self.replicas = DistributedDataParallel(model, forward_sync_buffers=False)
        return self.replicas

    def part(self, last: bool) -> AbstractContextManager:
        """What a part's forward and backward pass are done in."""
        return nullcontext() if last or not self.replicas else self.replicas.no_sync()

    def backward(self, scaled: Tensor, loss: Tensor) -> None:
        """The backward pass of a part. loss: its share of the step's, `scaled`: the same for the backward pass."""
        (scaled * self.world.size).backward()  # as gradients are averaged over processes, not added up
        self.loss = self.loss + loss.detach()

    def finish(self) -> Tensor:
        """The loss of the step, whose gradients the parameters have."""
        loss, self.loss = self.loss, 0.0
        return self.world.add_up(loss)


class Sharded(Fast):
    """The same for a model whose parameters are in pieces: each process gets the sum for its own, while the backward
    pass goes on."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that parts go through, which adds up by itself."""
        return model


REDUCTIONS = {"exact": Exact, "fast": Fast, "sharded": Sharded}


def check_parts(parts: int, rows: int | None, processes: int, reduce: str) -> None:
    """Raises UsageError where the parts of a step of so many rows cannot be spread over so many processes; rows: None
    where that is not decided yet."""
    if rows and parts > rows:
        raise UsageError(
            f"a step has {rows} rows (BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS), which cannot be cut into "
            f"STEP_PARTS={parts}"
        )
    if processes == 1:
        return

    def setting(parts: int) -> str:
        more = "" if not rows or parts <= rows else f" and BATCH_SIZE to {parts} or more"
        return f"STEP_PARTS={parts}{more}"

    even = -(-parts // processes) * processes
    if reduce == "exact" and processes & (processes - 1):
        fewer = 1 << (processes.bit_length() - 1)
        raise UsageError(
            f"REDUCE=exact works with 2, 4, 8, ... processes, and there are {processes}: start {fewer} or {2 * fewer}, "
            f"or set REDUCE=fast{'' if even == parts else f' and {setting(even)}'}"
        )
    if reduce == "exact" and parts & (parts - 1):
        even = max(processes, 1 << parts.bit_length())
        raise UsageError(f"REDUCE=exact needs STEP_PARTS to be 2, 4, 8, ..., and it is {parts}: set {setting(even)}")
    if reduce == "exact":
        even = max(parts, processes)
    if parts != even:
        raise UsageError(
            f"{processes} processes share the parts of a step equally, and STEP_PARTS={parts} (by default "
            f"GRADIENT_ACCUMULATION_STEPS): set {setting(even)}"
        )
