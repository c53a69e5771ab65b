"""What well-known guides claim of LoRA, beside what was recorded here.

python -m benchmarks.claims    the table, as docs/zero-to-hero/11-when.md has it

Nothing is measured: figures are those of benchmarks/results/, of the pages that hold other records, and of arithmetic.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import torch

from benchmarks.runs import ROOT
from jobs.runs.footprint import Plan, Shape, footprint
from lora.config import LoRAConfig
from models.config import ModelConfig
from runtime.device import Machine
from runtime.processes.command import run_command

LLAMA_2_7B = ModelConfig(
    32000, 4096, 32, 32, n_inner=11008, max_positions=4096, norm="rms", positions="rotary", mlp="gated_silu"
)
TEN = "10.7M, 4096 tokens: "
SMOL = "SmolLM2, 1024 tokens: "
WIDE = "85M, 1024 tokens: "


class Claim(NamedTuple):
    """What is claimed, the figures here, and the command that prints them."""

    claim: str
    here: str
    command: str


def recorded(name: str) -> dict[str, float]:
    """The median of each row of a record, by what it is of, without the sizes in brackets."""
    rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_bytes())["rows"]
    return {re.sub(r" \(.*\)$", "", row["what"]): row["median"] for row in rows}


def quoted(page: str, pattern: str) -> str:
    """What the first group of a pattern finds in a page. Raises AttributeError where the page has no such record."""
    return re.search(pattern, (ROOT / page).read_text("utf-8"))[1]


def fewer(config: ModelConfig, rank: int, targets: str) -> str:
    """How many fewer parameters than the model's an adapter trains."""
    adapter = LoRAConfig(rank, targets=targets, train_embeddings=False)
    found = footprint(Plan(Shape(config), Machine(torch.device("cpu"), torch.float32), adapter, rows=1, positions=1))
    return f"{100 - 100 * found.trained / (found.parameters - found.trained):.2f} %"


def of_time() -> list[Claim]:
    """Claims of how fast a step is."""
    step = recorded("lora_step")
    shares = {size: step[f"{size}, 4096 tokens: LoRA step / own full step"] for size in ("0.8M", "3.2M", "10.7M")}
    times = ", ".join(f"{1 / share:.2f} at {size}" for size, share in shares.items())
    percent = ", ".join(f"{100 * share:.0f} % at {size}" for size, share in shares.items())
    command = "python -m benchmarks.lora_step"
    bound = "matmuls alone would allow 1.5"
    return [
        Claim("3 to 10 times faster", f"{times} parameters; {bound}", command),
        Claim("30 % of the time", f"{percent} parameters; matmuls alone would allow 67 %", command),
    ]


def of_memory() -> list[Claim]:
    """Claims of how much memory a step takes."""
    peak, gpu, time = recorded("memory"), recorded("memory-gpu"), recorded("levers")

    def less(part: float, whole: float = 1.0) -> str:
        return f"{100 * (1 - part / whole):.0f} % less"

    def made_again(keeps: str) -> str:
        memory = less(peak[f"{TEN}lora {keeps} / full"], peak[f"{TEN}lora / full"])
        return f"`{keeps}`: {memory} memory, {100 * time[f'{TEN}a step of lora {keeps} / lora'] - 100:.0f} % more time"

    command = "python -m benchmarks.memory --base FOLDER"
    half = [
        f"{100 * peak[f'{TEN}lora / full']:.0f} % at 10.7M",
        f"{100 * gpu[f'{TEN}lora / full']:.0f} % there on an H200",
        f"{100 * peak[f'{SMOL}lora cheap / full']:.0f} % for SmolLM2-135M, whose activations are made again",
    ]
    four_bits = [
        f"{less(peak[f'{SMOL}lora nf4 block / lora block'])} than LoRA on bf16 (SmolLM2-135M)",
        f"{less(peak[f'{WIDE}lora nf4 block / full'])} than all weights in fp32 at 85M, activations made again",
        f"{less(gpu[f'{WIDE}lora nf4 block / full'])} there on an H200",
    ]
    return [
        Claim("50 % of the memory", ", ".join(half), command),
        Claim("60 to 75 % less memory in 4 bits", ", ".join(four_bits), command),
        Claim("checkpointing: 40 % less memory, 20 % more time", "; ".join(map(made_again, ("cheap", "block"))),
              "python -m benchmarks.levers --base FOLDER"),
    ]  # fmt: skip


def of_size() -> Claim:
    """The claim of how few parameters train."""
    here = [
        f"Llama-2-7B: {fewer(LLAMA_2_7B, 8, 'minimal')} at rank 8 on q and v",
        f"{fewer(LLAMA_2_7B, 16, 'all-linear')} at rank 16 on all linears",
        f"the default base of 0.8M: {fewer(ModelConfig(96, 128, positions='rotary'), 8, 'all')}",
    ]
    return Claim("99.9 % fewer parameters", ", ".join(here), "python -m benchmarks.claims")


def of_use() -> list[Claim]:
    """Claims of what the trained adapter is like."""
    speed = recorded("generate")
    plain = {what: ratio for what, ratio in speed.items() if what.endswith("time / ours")}
    slower = [100 * (ratio / speed[f"{what} with an adapter"] - 1) for what, ratio in plain.items()]
    forgets = [quoted("docs/variants.md", rf"\| {kind} \|.*\| \+([\d.]+) \|\n") for kind in ("full", "lora r8")]
    gain = quoted("benchmarks/README.md", r"r8 at [\d.]+: .*\)   ([\d.]+) % ")
    return [
        Claim("inference costs 5 to 10 % more", f"kept apart {min(slower):.0f} to {max(slower):.0f} % more; merged "
              "0, as that is a plain model", "python -m benchmarks.generate"),
        Claim("no catastrophic forgetting", f"the loss on the base's own text rises by {forgets[1]}, and by "
              f"{forgets[0]} where all weights train", "python compare.py --variants all"),
        Claim("the same results, or better", f"{gain} % of what all weights gain, at rank 8", "make gap"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """All of them."""
    return [*of_time(), *of_memory(), of_size(), *of_use()]


def print_table() -> None:
    """Print them as a table in Markdown."""
    print("| claim | here | command |\n|---|---|---|")
    for claim, here, command in claims():
        print(f"| {claim} | {here} | `{command}` |")


if __name__ == "__main__":
    run_command(print_table)
