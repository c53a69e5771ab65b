"""The arithmetic of many GPUs: its closed forms against simulations, message by message, and its table in the docs."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import scaling_model
from benchmarks.scaling_model import NETWORKS, SHAPES, Link, Network, Step
from runtime.processes.launch import Launch
from runtime.processes.world import World

DOCS = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
SLOW = Link(1e-3, 1e6)
FLAT = Network("flat", SLOW, SLOW, ports=8)


class Recording(World):
    """Writes down what it would send."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(Launch(rank, size))
        self.messages: list[tuple[int, int]] = []  # to whom, and how many bytes

    def _exchange(self, given: torch.Tensor, received: torch.Tensor, other: int) -> None:
        self.messages.append((other, given.nbytes))


def schedule(size: int, length: int) -> list[list[tuple[int, int]]]:
    """What each process sends when the real reduction adds up a vector of so many fp32 values."""
    worlds = [Recording(rank, size) for rank in range(size)]
    for world in worlds:
        world.add_up_in_order(torch.zeros(length))
    return [world.messages for world in worlds]


def simulated(network: Network, messages: list[list[tuple[int, int]]]) -> float:
    """Seconds until all processes have sent and received all, each waiting for its partner; those of a machine that
    talk to others at once share its ports."""
    clocks = [0.0] * len(messages)
    for turn in zip(*messages, strict=True):
        before = list(clocks)
        for rank, (other, size) in enumerate(turn):
            assert turn[other][0] == rank  # the partner talks to this one
            within = rank // network.gpus == other // network.gpus
            link, sharing = (network.inside, 1) if within else (network.port, network.gpus / network.ports)
            most = max(size, turn[other][1])
            clocks[rank] = max(before[rank], before[other]) + link.seconds(most, sharing)
    return max(clocks)


@pytest.mark.parametrize("count", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("network", [FLAT, *NETWORKS], ids=lambda network: network.name)
def test_halving_and_doubling_takes_what_its_messages_take(network: Network, count: int) -> None:
    length = 64 * 100
    expected = simulated(network, schedule(count, length))
    assert scaling_model.halving_and_doubling(network, count, 4 * length) == pytest.approx(expected, rel=1e-9)
    if network is FLAT:
        closed = 2 * math.log2(count) * SLOW.latency + 2 * (count - 1) / count * 4 * length / SLOW.bandwidth
        assert expected == pytest.approx(closed, rel=1e-9)


def test_a_length_that_does_not_divide_changes_little() -> None:
    expected = simulated(FLAT, schedule(16, 100_003))
    assert scaling_model.halving_and_doubling(FLAT, 16, 4 * 100_003) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("count", [2, 8, 16, 64])
def test_a_ring_takes_twice_its_laps(count: int) -> None:
    size, clocks = 1000.0 * count, [0.0] * count
    for _ in range(2 * (count - 1)):  # each sends a piece on as soon as it has the one from behind
        clocks = [max(clocks[rank], clocks[rank - 1]) + SLOW.seconds(size / count) for rank in range(count)]
    assert scaling_model.ring(FLAT, count, size) == pytest.approx(max(clocks))


@pytest.mark.parametrize(("work", "each"), [(1.0, 0.01), (1.0, 0.1), (1.0, 0.3), (1.0, 2.0)])
def test_overlap_is_a_pipeline(work: float, each: float, pieces: int = 10) -> None:
    sent = 0.0
    for i in range(pieces):
        sent = max(sent, (i + 1) * work / pieces) + each
    assert scaling_model.overlapped(work, pieces, each) == pytest.approx(sent)


def test_more_gpus_are_never_more_efficient() -> None:
    for network in NETWORKS:
        for shape in SHAPES:
            for lora in (False, True):
                step = scaling_model.step_of(shape, lora)
                for seconds in scaling_model.WAYS.values():
                    times = [seconds(step, network, count) for count in scaling_model.GPUS]
                    assert all(a <= b * (1 + 1e-9) for a, b in pairwise([step.alone, *times]))


def test_a_step_is_what_is_known_of_these_models() -> None:
    gpt2, llama = SHAPES
    assert llama.adapters == 39_976_960  # docs/memory.md: gradients of 159.9 MB
    full, lora = scaling_model.step_of(gpt2, False), scaling_model.step_of(gpt2, True)
    flops = (6 * gpt2.parameters + 12 * 12 * 768 * 1024) * scaling_model.TOKENS
    assert full.alone * scaling_model.FLOPS == pytest.approx(flops)
    assert 0.6 < lora.alone / full.alone < 0.8


def test_the_fit_finds_what_it_was_made_of() -> None:
    link = Link(2e-4, 1.5e9)
    rows = [
        {"way": "exact", "processes": 4, "values": n, "seconds": 4 * link.latency + 1.5 * 4 * n / link.bandwidth}
        for n in (1, 1000, 1_000_000)
    ]
    found = scaling_model.fitted(rows, "exact", 4)
    assert found.latency == pytest.approx(link.latency) and found.bandwidth == pytest.approx(link.bandwidth)
    with pytest.raises(ValueError, match="2 processes"):
        scaling_model.fitted(rows, "exact", 2)


def test_without_communication_a_step_is_that_of_one() -> None:
    free = Network("free", Link(0.0, math.inf), Link(0.0, math.inf), ports=8)
    step = Step(1.0, 2.0, 1e9, 1e9, blocks=4)
    for seconds in scaling_model.WAYS.values():
        assert seconds(step, free, 64) == pytest.approx(3.0)


def test_the_docs_have_the_table() -> None:
    assert scaling_model.table() in DOCS.read_text("utf-8")
