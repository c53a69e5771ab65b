"""One optimisation step of each kind of adapter against one of LoRA, each with the rank it has by default.

python -m benchmarks.variants                       3.2M and 10.7M parameters, 4,096 tokens a step
python -m benchmarks.variants --sizes 3.2M --rounds 3
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import peers
from benchmarks.contest import SIZES, by_size, ratio, take_turns
from benchmarks.lora_step import make_step
from jobs.runs.job import lora_config
from lora.attach import attach
from runtime.device import pick_machine
from runtime.processes.command import run_command
from runtime.settings.config import Settings

KINDS = {  # settings, and the part of LoRA's time that a step may take
    "lora": ({"lora_plus_ratio": 1.0}, None),
    "lora+": ({}, 1.0),
    "rslora": ({"lora_variant": "rslora"}, 1.0),
    "dora": ({"lora_variant": "dora"}, 1.25),
    "vera": ({"lora_variant": "vera"}, 1.1),
    "adalora": ({"lora_variant": "adalora"}, 1.25),
}


def contestants(size: tuple[int, ...], tokens: int, device: str) -> dict[str, Callable[[], object]]:
    """A step of each kind, and of all weights, by name."""
    machine = pick_machine(device, "auto")
    steps = {"full": make_step(peers.ours(size), machine, size, tokens)}
    for name, (values, _) in KINDS.items():
        settings, model = Settings.from_dict({"use_lora": True} | values), peers.ours(size)
        torch.manual_seed(0)
        attach(model, lora_config(settings))
        steps[name] = make_step(model, machine, size, tokens, settings.lora_plus_ratio)
    return steps


def measure(size: str, tokens: int, rounds: int, device: str) -> list[dict]:
    """The rows for one size and one number of tokens a step."""
    seconds = take_turns(contestants(SIZES[size], tokens, device), rounds, pick_machine(device, "auto"))
    pairs = [(name, "lora", goal) for name, (_, goal) in KINDS.items() if goal] + [("lora", "full", None)]
    return [
        {"what": f"{size}, {tokens} tokens: {one} step / {other} step", "size": size, "tokens": tokens, "one": one}
        | {"other": other, "goal": goal}
        | ratio(seconds, one, other)
        for one, other, goal in pairs
    ]


def main() -> None:
    """Run the command."""
    by_size("variants", __doc__, measure, rounds=15, sizes=["3.2M", "10.7M"], tokens=[4096])


if __name__ == "__main__":
    run_command(main)
