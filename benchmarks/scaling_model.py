"""What many GPUs would make of a training step, on paper: arithmetic, not a measurement.

python -m benchmarks.scaling_model                   the table of docs/scaling.md

A message takes a latency (alpha) and then so many seconds a byte (beta): Hockney 1994, "The communication challenge
for MPP". Each GPU takes the same number of tokens a step, however many there are (weak scaling). Efficiency is the
time of a step without communication over that with it; optimizer, copies and stragglers count as nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.scaling import RECORD, recorded
from runtime.processes.command import run_command

GPUS = [2**n for n in range(3, 11)]
FLOPS = 0.4 * 989e12  # a second: 40 % of an H100 SXM's (or H200's) peak in bf16 without sparsity, by its data sheet
TOKENS = 16_384  # that a GPU takes in a step
RANK = 16  # of LoRA on all linears of the blocks
BUCKET = 25 * 2**20  # bytes that DistributedDataParallel adds up at once, by default
BOUND = 0.9


@dataclass(frozen=True)
class Link:
    """latency: seconds a message. bandwidth: bytes a second, in each direction at once."""

    latency: float
    bandwidth: float

    def seconds(self, size: float, sharing: float = 1) -> float:
        """For a message of so many bytes on a link that so many messages share."""
        return self.latency + size * sharing / self.bandwidth


@dataclass(frozen=True)
class Network:
    """GPUs in machines of `gpus` each. inside: a GPU's link in its machine; port: one of the `ports` of a machine,
    which its name tells."""

    name: str
    inside: Link
    port: Link
    ports: int
    gpus: int = 8


# NVLink 4: 900 GB/s of an H100, both directions together, by its data sheet. 400 Gb/s are 50 GB/s, 25 Gb/s 3.125.
# Latencies of NVLink (3.4 us) and of a network (14 us) are NCCL's own for its ring ("hwLat", protocol Simple, in
# src/graph/tuning.cc); 50 us, for TCP through the kernel, are assumed.
NVLINK = Link(3.4e-6, 450e9)
NETWORKS = (
    Network("8 x 400 Gb/s", NVLINK, Link(14e-6, 50e9), 8),
    Network("1 x 25 Gb/s", NVLINK, Link(50e-6, 3.125e9), 1),
)


@dataclass(frozen=True)
class Shape:
    """A transformer: its parameters, blocks, width, context, and the (inputs, outputs) of a block's linears."""

    name: str
    parameters: float
    blocks: int
    width: int
    context: int
    linears: tuple[tuple[int, int], ...]

    @property
    def adapters(self) -> int:
        """How many weights LoRA trains."""
        return self.blocks * RANK * sum(map(sum, self.linears))


SHAPES = (  # GPT-2 and Llama-2-7B
    Shape("124M", 124.4e6, 12, 768, 1024, ((768, 768),) * 4 + ((768, 3072), (3072, 768))),
    Shape("7B", 6.738e9, 32, 4096, 4096, ((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),)),
)


@dataclass(frozen=True)
class Step:
    """A step of one GPU. forward, backward: seconds. trained: bytes of gradients, in fp32. gathered: bytes of the
    weights that SHARD collects, in which they are stored: fp32 where all train, bf16 where they are frozen."""

    forward: float
    backward: float
    trained: float
    gathered: float
    blocks: int

    @property
    def alone(self) -> float:
        """Seconds without communication."""
        return self.forward + self.backward


def step_of(shape: Shape, lora: bool) -> Step:
    """A step by counting: 2 FLOPs a token for each weight forward, as many again for the gradient of the inputs and
    for that of the weights that train, and attention's 4 x blocks x width x context forward, twice that backward
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
    attention = 4 * shape.blocks * shape.width * shape.context
    trained = shape.adapters if lora else shape.parameters
    used = shape.parameters + (shape.adapters if lora else 0)
    a_second = TOKENS / FLOPS
    forward, backward = (2 * used + attention) * a_second, (2 * used + 2 * trained + 2 * attention) * a_second
    return Step(forward, backward, 4 * trained, (2 if lora else 4) * shape.parameters, shape.blocks)


def halving_and_doubling(network: Network, count: int, size: float) -> float:
    """Seconds of REDUCE=exact for a vector of so many bytes over a power of two of GPUs: halves are exchanged at
    distances of 1, 2, 4, ..., and the sums in reverse. On one kind of link this is 2 log2(n) messages and
    2 (n - 1) / n of the vector. Only the pieces that are left after three halvings leave a machine of 8."""
    seconds, distance = 0.0, 1
    while distance < count:
        size /= 2
        link, sharing = (network.inside, 1) if distance < network.gpus else (network.port, network.gpus / network.ports)
        seconds += 2 * link.seconds(size, sharing)
        distance *= 2
    return seconds


def ring(network: Network, count: int, size: float) -> float:
    """Seconds of an all-reduce in a ring, twice around: 2 (n - 1) messages of the n-th part of the vector, one after
    the other through all links. Each port of a machine has a ring of its own, with its share of the vector."""
    across = count // network.gpus if count > network.gpus else 0  # links of the ring that leave a machine
    laps = 2 * (count - 1) / count
    latency = laps * ((count - across) * network.inside.latency + across * network.port.latency)
    slowest = min(network.inside.bandwidth, network.port.bandwidth * network.ports if across else math.inf)
    return latency + laps * size / slowest


def exact(step: Step, network: Network, count: int) -> float:
    """Seconds of a step with REDUCE=exact, which adds up when the backward pass is over."""
    return step.alone + halving_and_doubling(network, count, step.trained)


def fast(step: Step, network: Network, count: int) -> float:
    """Seconds of a step with REDUCE=fast, which adds up a bucket while the backward pass makes the next ones."""
    buckets = math.ceil(step.trained / BUCKET)
    return step.forward + overlapped(step.backward, buckets, ring(network, count, step.trained / buckets))


def overlapped(work: float, pieces: int, each: float) -> float:
    """Seconds until the last of so many equal pieces of work is sent, each when it is done and the one before is."""
    return max(work + each, work / pieces + pieces * each)


def sharded(step: Step, network: Network, count: int) -> float:
    """Seconds of a step with SHARD, which collects a block's weights while it computes the block before, forward and
    backward, and spreads out its gradients while it computes the next."""
    gather = ring(network, count, step.gathered / step.blocks) / 2  # half an all-reduce
    scatter = ring(network, count, step.trained / step.blocks) / 2
    forward, backward = step.forward / step.blocks, step.backward / step.blocks
    collected = 2 * gather + (step.blocks - 1) * (max(forward, gather) + max(backward, gather + scatter))
    return collected + forward + backward + scatter


WAYS = {"`REDUCE=exact`": exact, "`REDUCE=fast`": fast, "`SHARD=True`": sharded}


def first_below(efficiencies: Sequence[float]) -> str:
    """At how many GPUs the efficiency is first below the bound; "-" where it is at none of these."""
    return next((f"{count:,}" for count, each in zip(GPUS, efficiencies, strict=True) if each < BOUND), "-")


def table() -> str:
    """Efficiencies as Markdown."""
    lines = [
        f"| network | model | step | {' | '.join(f'{count:,}' for count in GPUS)} | below {BOUND:g} at |",
        "|---" * (4 + len(GPUS)) + "|",
    ]
    for network in NETWORKS:
        for shape in SHAPES:
            for training, lora in (("full", False), ("LoRA", True)):
                step = step_of(shape, lora)
                for way, seconds in WAYS.items():
                    found = [step.alone / seconds(step, network, count) for count in GPUS]
                    cells = [network.name, f"{shape.name}, {training}", way, *(f"{each:.2f}" for each in found)]
                    lines.append(f"| {' | '.join([*cells, first_below(found)])} |")
    return "\n".join(lines)


def fitted(rows: Sequence[dict[str, Any]], way: str, processes: int) -> Link:
    """The latency and bandwidth with which halving and doubling takes what was measured for vectors of each length, by
    least squares of the relative errors. Raises ValueError where there are fewer than two lengths."""
    rows = [row for row in rows if row.get("way") == way and row.get("processes") == processes and "values" in row]
    if len(rows) < 2:
        raise ValueError(f"no sums of vectors over {processes} processes are recorded")
    messages, share = 2 * math.log2(processes), 2 * (processes - 1) / processes
    terms = [(messages / row["seconds"], share * 4 * row["values"] / row["seconds"]) for row in rows]
    (latency, a_byte), *_ = np.linalg.lstsq(np.array(terms), np.ones(len(rows)), rcond=None)
    return Link(max(float(latency), 0.0), 1 / max(float(a_byte), 1e-15))


def checked(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that compare the model with what was recorded on two processes of a thread each."""
    link = fitted(rows, "exact", 2)
    lines = [
        f"Measured on two processes of one machine: {1e6 * link.latency:.0f} us a message, "
        f"{link.bandwidth / 1e9:.2f} GB/s. REDUCE=exact with these, of the speed of one process:"
    ]
    speeds = {(row["dtype"], row["name"], row["team"], row["way"]): row for row in rows if "weights" in row}
    for (dtype, name, team, way), row in speeds.items():
        if team == "2x1" and way == "exact":
            alone = speeds[dtype, name, "1x1", "exact"]["seconds"]
            predicted = alone / (alone / 2 + 2 * link.seconds(4 * row["weights"] / 2))
            lines.append(f"   {name}, {dtype}: {predicted:.2f}; measured {alone / row['seconds']:.2f}")
    return lines


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.parse_args()
    print(table())
    if RECORD.exists():
        print()
        print("\n".join(checked(recorded())))


if __name__ == "__main__":
    run_command(main)
