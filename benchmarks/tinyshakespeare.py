"""nanoGPT's CPU recipe on tinyshakespeare: same shapes, same budget of tokens, loss over the whole validation text.

python -m benchmarks.tinyshakespeare    three seeds
"""

from __future__ import annotations

from benchmarks.runs import median, train
from runtime.device import machine_name
from runtime.processes.command import run_command

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
BUDGET = {"batch_size": 12, "max_iters": 2000, "dropout": 0.0}
OURS = {"learning_rate": 4e-3, "warmup_iters": 100, "eval_interval": 500}
SEEDS = (1337, 1338, 1339)


def main() -> None:
    """Run the command."""
    losses = [
        train(f"tiny-{seed}", dataset="tinyshakespeare", seed=seed, **SHAPE, **BUDGET, **OURS)["val_loss"]
        for seed in SEEDS
    ]
    print(f"tinyshakespeare, nanoGPT's CPU recipe, loss over the whole validation text: {median(losses)}")
    print(machine_name())


if __name__ == "__main__":
    run_command(main)
