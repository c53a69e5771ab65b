"""One optimisation step: ours with LoRA and without, against a plain GPT, PEFT and loralib on the same shapes.

python -m benchmarks.lora_step                       0.8M, 3.2M and 10.7M parameters, 4,096 and 1,024 tokens a step
python -m benchmarks.lora_step --sizes 0.8M --rounds 3
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import peers
from benchmarks.contest import SIZES, by_size, ratio, take_turns
from jobs.comparing.timing import repeatable
from runtime.device import Machine, pick_machine
from runtime.processes.command import run_command

PEFT_GOALS = {"0.8M": 0.36, "3.2M": 0.45, "10.7M": 0.48}
LORALIB_GOALS = {"0.8M": 0.80, "3.2M": 0.80, "10.7M": 0.82}
# (contestant, against, what it says, goal by size)
ROWS = (
    ("lora auto", "full auto", "LoRA step / own full step", {"0.8M": 0.95, "3.2M": 0.82, "10.7M": 0.75}),
    ("lora fp32", "full fp32", "LoRA step / own full step, fp32", {"0.8M": 0.88, "3.2M": 0.78, "10.7M": 0.72}),
    ("lora frozen", "full auto", "LoRA step with frozen embeddings / own full step", {}),
    ("lora dropout", "lora auto", "LoRA step with a dropout of 0.05 / without", dict.fromkeys(SIZES, 1.15)),
    ("full auto", "plain fp32", "own full step / plain GPT in fp32", {"0.8M": 0.36, "3.2M": 0.28, "10.7M": 0.27}),
    ("lora auto", "transformers peft", "LoRA step / PEFT on transformers' GPT-2", PEFT_GOALS),
    ("lora auto", "peft on ours", "LoRA step / PEFT on our own model", dict.fromkeys(SIZES, 0.85)),
    ("lora auto", "loralib on ours", "LoRA step / loralib on our own model", LORALIB_GOALS),
)


def contestants(size: tuple[int, ...], tokens: int, device: str) -> dict[str, Callable[[], object]]:
    """The steps that are timed, by name."""
    auto, fp32 = pick_machine(device, "auto"), pick_machine(device, "fp32")
    models = {
        "full auto": (peers.ours(size), auto),
        "full fp32": (peers.ours(size), fp32),
        "lora auto": (peers.ours(size, lora=True), auto),
        "lora fp32": (peers.ours(size, lora=True), fp32),
        "lora frozen": (peers.ours(size, lora=True, embeddings=False), auto),
        "lora dropout": (peers.ours(size, lora=True, dropout=0.05), auto),
        "plain fp32": (peers.PlainGPT(*size), fp32),
        "transformers peft": (peers.transformers_peft(size), auto),
        "peft on ours": (peers.peft_on_ours(size), auto),
        "loralib on ours": (peers.loralib_on_ours(size), auto),
    }
    return {name: make_step(model, machine, size, tokens) for name, (model, machine) in models.items()}


def make_step(
    model: torch.nn.Module, machine: Machine, size: tuple[int, ...], tokens: int, lora_plus_ratio: float = 1.0
) -> Callable[[], object]:
    """A step of `tokens` tokens that is taken again and again."""
    vocab, context = size[0], size[-1]
    torch.manual_seed(0)
    rows = torch.randint(vocab, (tokens // context, context + 1))
    return partial(repeatable(model, rows, machine, lora_plus_ratio).step, 0)


def measure(size: str, tokens: int, rounds: int, device: str) -> list[dict]:
    """The rows for one size and one number of tokens a step."""
    seconds = take_turns(contestants(SIZES[size], tokens, device), rounds, pick_machine(device, "auto"))
    gc.collect()
    return [
        {"what": f"{size}, {tokens} tokens: {what}", "size": size, "tokens": tokens, "one": one, "other": other}
        | ratio(seconds, one, other)
        | {"goal": goals.get(size) if tokens == 4096 else None}
        for one, other, what, goals in ROWS
    ]


def main() -> None:
    """Run the command."""
    by_size("lora_step", __doc__, measure, rounds=9, sizes=["0.8M", "3.2M", "10.7M"], tokens=[4096, 1024])


if __name__ == "__main__":
    run_command(main)
