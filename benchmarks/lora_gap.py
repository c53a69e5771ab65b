"""How much of full fine-tuning's gain LoRA reaches on folio, at equal steps, each at its best learning rate.

python -m benchmarks.lora_gap    a grid of learning rates with one seed, then three seeds at the best of each, in 500
                                 steps and in 1,200
"""

from __future__ import annotations

import statistics

from benchmarks.runs import median, train
from runtime.device import machine_name
from runtime.processes.command import run_command

KINDS = {"full": {"use_lora": False}, "r8": {"use_lora": True}, "r32": {"use_lora": True, "lora_rank": 32}}
GRID = {"full": (5e-4, 1e-3, 2e-3, 4e-3), "r8": (2e-3, 4e-3, 6e-3), "r32": (2e-3, 4e-3, 6e-3)}
SEEDS = (1337, 1338, 1339)
STEPS = (500, 1200)


def adapt(kind: str, rate: float, seed: int, steps: int) -> dict:
    """Adapt the base to folio with all weights or with LoRA."""
    about = {"base": "base", "dataset": "folio", "seed": seed, "learning_rate": rate, "max_iters": steps}
    return train(f"gap-{kind}-{rate:g}-{steps}-{seed}", **about, **KINDS[kind])


def best_rates() -> dict[str, float]:
    """By kind, the rate of the grid with the lowest loss."""
    best = {}
    for kind, rates in GRID.items():
        losses = {rate: adapt(kind, rate, SEEDS[0], STEPS[0])["val_loss"] for rate in rates}
        best[kind] = min(losses, key=losses.__getitem__)
        print(f"{kind}: " + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in losses.items()), flush=True)
    return best


def compare(best: dict[str, float], steps: int) -> None:
    """Three seeds of each kind, and what LoRA reaches of the gain of all weights."""
    after = {kind: [adapt(kind, rate, seed, steps) for seed in SEEDS] for kind, rate in best.items()}
    before = after["r8"][0]["base_val_loss"]
    print(f"{steps} steps; the base untouched: {before:.4f}")
    for kind, results in after.items():
        gains = [
            100 * (before - result["val_loss"]) / (before - full["val_loss"])
            for result, full in zip(results, after["full"], strict=True)
        ]
        share = f"   {statistics.median(gains):.1f} % ({min(gains):.1f} to {max(gains):.1f}) of full's gain"
        losses = median(result["val_loss"] for result in results)
        print(f"{kind} at {best[kind]:g}: {losses}{share if kind != 'full' else ''}", flush=True)


def main() -> None:
    """Run the command."""
    train("base")
    best = best_rates()
    for steps in STEPS:
        compare(best, steps)
    print(machine_name())


if __name__ == "__main__":
    run_command(main)
