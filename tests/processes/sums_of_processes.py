"""What processes that torchrun started add up, against sums in float64 and the bytes that the formula allows.

Ends with status 0 if all is well, and with a traceback otherwise.
"""

from __future__ import annotations

import torch
from balanced import bytes_sent, tree_sum

from runtime.processes.command import run_command
from runtime.processes.launch import Launch
from runtime.processes.world import World, world
from tests.runtime.tiny_steps import Tiny, batch, stepper

EPSILON = 2.0**-24  # how far, of itself, a sum of two numbers in fp32 is from what it is at most
PARTS = 4
LENGTHS = (0, 1, 2, 3, 7, 64, 1001)


def vectors(length: int) -> list[torch.Tensor]:
    """One for each process, of sizes that let the order of a sum show."""
    torch.manual_seed(length)
    return [torch.randn(length) * 10.0**rank for rank in range(world().size)]


def check_sums() -> None:
    for length in LENGTHS:
        world().sent = 0
        rows = vectors(length)
        added = world().add_up_in_order(rows[world().rank].clone())
        assert torch.equal(added, tree_sum(rows)), length
        halves = 2 * (world().size.bit_length() - 1)  # exchanges, each of half a vector, rounded to a number of 4 bytes
        assert abs(world().sent - bytes_sent(length, world().size)) <= 4 * halves, length


def gradients(reduce: str, only: int | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The gradients of a step, as they are reduced; or of one part of it alone, and then as float64."""
    one = stepper(Tiny(), parts=PARTS, reduce=reduce)
    if only is not None:
        one.mine, one.reduction.world = [only], World(Launch())
    one.model.train()
    loss = one.backward(batch(0, rows=8))
    return [p.grad.clone() for p in one.parameters], loss


def check_gradients() -> None:
    """Both reductions are as near to the float64 sum of the parts as sums of so many numbers of fp32 are."""
    parts = [gradients("exact", only=part) for part in range(PARTS)]
    bound = (PARTS + 1) * EPSILON  # a rounding for each addition, and as many more for the mean over processes
    for reduce in ("exact", "fast"):
        found, loss = gradients(reduce)
        for i, gradient in enumerate(found):
            terms = torch.stack([part[0][i].double() for part in parts])
            assert ((gradient.double() - terms.sum(0)).abs() <= bound * terms.abs().sum(0)).all(), (reduce, i)
        terms = torch.stack([part[1].double() for part in parts])
        assert (loss.double() - terms.sum()).abs() <= bound * terms.sum(), reduce


def main() -> None:
    world().join(60, torch.device("cpu"))
    assert world().size > 1
    check_sums()
    check_gradients()


if __name__ == "__main__":
    run_command(main, many=True)
