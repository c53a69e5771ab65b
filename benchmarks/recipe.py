"""The recipe of a base: what each setting of the grid makes of its loss, and of the time of a step.

python -m benchmarks.recipe                               all of the grid, three seeds (an hour and a half on 2 cores)
python -m benchmarks.recipe --only usual llama --seeds 1337
python -m benchmarks.recipe --max-iters 100 --seeds 1     a look

Bases on Shakespeare with the defaults, but for the settings of a row. Losses are over the whole held-out text. Steps of
all rows are timed in turn in one process; a run's time as a share of the usual one's is that ratio times that of the
steps, so that a row of shorter runs says what is better in the same time.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.contest import close, parser, ratio, take_turns
from benchmarks.runs import median, train
from jobs.runs.job import prepare
from runtime.device import Machine, pick_machine
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved

SEEDS = (1337, 1338, 1339)
USUAL = "usual"
GRID: dict[str, dict] = {
    USUAL: {},
    "adamw": {"optimizer": "adamw"},
    "cosine": {"lr_decay": "cosine"},
    "rate 3e-3": {"learning_rate": 3e-3},
    "rate 8e-3": {"learning_rate": 8e-3},
    "no weight decay": {"weight_decay": 0.0},
    "weight decay 0.3": {"weight_decay": 0.3},
    "beta2 0.95": {"beta2": 0.95},
    "half a batch, twice the steps": {"batch_size": 8, "max_iters": 3400},
    "two batches, half the steps": {"batch_size": 32, "max_iters": 850},
    "gpt": {"architecture": "gpt"},
    "gpt, more steps": {"architecture": "gpt", "max_iters": 1800},
    "llama": {"architecture": "llama"},
    "llama, fewer steps": {"architecture": "llama", "max_iters": 1450},
}


def steps_of(label: str, max_iters: int | None) -> int:
    """How many steps a row's runs take; where `max_iters` is asked, as much less as that is than usual."""
    usual, steps = Settings().max_iters, GRID[label].get("max_iters", Settings().max_iters)
    return steps if max_iters is None else max(1, steps * max_iters // usual)


def loss(label: str, seed: int, max_iters: int | None, data_dir: Path) -> float:
    """Train a base and return its loss over the whole held-out text."""
    settings = GRID[label] | {"seed": seed, "max_iters": steps_of(label, max_iters)}
    name = f"recipe-{label}-{settings['max_iters']}-{seed}".replace(", ", "-").replace(" ", "-")
    return train(name, dataset="shakespeare", data_dir=data_dir, **settings)["val_loss"]


def step_of(label: str, machine: Machine, data_dir: Path) -> Callable[[], object]:
    """The next step of a run, on the run's own batches."""
    settings = Settings(**GRID[label], data_dir=str(data_dir))
    stepper, count = prepare(Resolved(settings, {}), machine, None).stepper(), itertools.count()
    return lambda: stepper.step(next(count))


def measure(labels: Sequence[str], seeds: Sequence[int], options) -> list[dict]:
    """A row for each label; every row is compared with the usual one."""
    machine = pick_machine(options.device, "auto")
    labels = [USUAL, *(label for label in labels if label != USUAL)]
    seconds = take_turns({each: step_of(each, machine, options.data_dir) for each in labels}, options.rounds, machine)
    rows = []
    for label in labels:
        losses = [loss(label, seed, options.max_iters, options.data_dir) for seed in seeds]
        share = steps_of(label, options.max_iters) / steps_of(USUAL, options.max_iters)
        time = {name: value * share for name, value in ratio(seconds, label, USUAL).items()}
        rows.append({"what": label, "losses": losses, "loss": statistics.median(losses)} | time)
        times = f"{time['median']:.2f} ({time['min']:.2f} to {time['max']:.2f}) of the usual time"
        print(f"{label:<30} loss {median(losses)}   {times}", flush=True)
    return rows


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=100)
    flags.add_argument("--only", nargs="+", choices=GRID, default=list(GRID), metavar="ROW", help=", ".join(GRID))
    flags.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    flags.add_argument("--max-iters", type=int, help="steps of the usual run, in place of the default's; others follow")
    flags.add_argument("--data-dir", type=Path, default=Path("data") / "cache")
    options = flags.parse_args()
    close("recipe", measure(options.only, options.seeds, options), options.record)


if __name__ == "__main__":
    run_command(main)
