"""The learning rate of each variant: a grid on `folio`, with the default base and one seed.

python -m benchmarks.variant_rates                     all of the grid; what was trained before is not trained again
python -m benchmarks.variant_rates --only vera dora

The best of each is the variant's default LEARNING_RATE in runtime/settings/config.py.
"""

from __future__ import annotations

import argparse

from benchmarks.runs import train
from runtime.device import machine_name
from runtime.processes.command import run_command

SEED = 1337
USUAL = (2e-3, 4e-3, 8e-3, 16e-3)
GRID = {
    "full": ({}, (1e-3, 2e-3, 4e-3, 8e-3)),
    "lora": ({"lora_plus_ratio": 1}, USUAL),
    "lora+": ({}, USUAL),
    "rslora": ({"lora_variant": "rslora"}, USUAL),
    "dora": ({"lora_variant": "dora"}, USUAL),
    "vera": ({"lora_variant": "vera"}, (8e-3, 16e-3, 32e-3, 64e-3)),
    "adalora": ({"lora_variant": "adalora"}, USUAL),
}


def adapt(label: str, settings: dict, rate: float) -> float:
    """Validation loss after adapting the base to folio."""
    same = {"base": "base", "dataset": "folio", "seed": SEED, "use_lora": label != "full", "learning_rate": rate}
    return train(f"rates-{label.replace('+', 'plus')}-{rate:g}", **same, **settings)["val_loss"]


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", nargs="+", choices=GRID, default=list(GRID))
    options = flags.parse_args()
    train("base")
    for label in options.only:
        settings, rates = GRID[label]
        losses = {rate: adapt(label, settings, rate) for rate in rates}
        best = min(losses, key=losses.__getitem__)
        told = ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in losses.items())
        print(f"{label:<8} best at {best:g}: {told}", flush=True)
    print(machine_name())


if __name__ == "__main__":
    run_command(main)
