"""How much of full fine-tuning's gain LoRA reaches on folio, at equal steps, each at its best learning rate.

python -m benchmarks.lora_gap    a grid of learning rates with one seed, then three seeds at the best of each
"""

from __future__ import annotations

import statistics

from benchmarks.runs import median, train
from runtime.device import machine_name
from runtime.processes.command import run_command

GRID = {"full": (5e-4, 1e-3, 2e-3, 4e-3), "lora": (2e-3, 4e-3, 6e-3)}
SEEDS = (1337, 1338, 1339)


def adapt(kind: str, rate: float, seed: int) -> dict:
    """Adapt the base to folio with all weights or with LoRA r=8."""
    name = f"{kind}-{rate:g}-{seed}"
    return train(name, base="base", use_lora=kind == "lora", learning_rate=rate, seed=seed, dataset="folio")


def main() -> None:
    """Run the command."""
    train("base")
    best, after = {}, {}
    for kind, rates in GRID.items():
        losses = {rate: adapt(kind, rate, SEEDS[0])["val_loss"] for rate in rates}
        best[kind] = min(losses, key=losses.__getitem__)
        print(f"{kind}: " + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in losses.items()), flush=True)
        after[kind] = [adapt(kind, best[kind], seed) for seed in SEEDS]
    before = after["lora"][0]["base_val_loss"]
    closed = [
        100 * (before - lora["val_loss"]) / (before - full["val_loss"])
        for full, lora in zip(after["full"], after["lora"], strict=True)
    ]
    print(f"base untouched: {before:.4f}")
    for kind, results in after.items():
        print(f"{kind} at {best[kind]:g}: {median(result['val_loss'] for result in results)}")
    print(f"LoRA r=8 closes {statistics.median(closed):.1f} % ({min(closed):.1f} to {max(closed):.1f}) of the distance")
    print(machine_name())


if __name__ == "__main__":
    run_command(main)
