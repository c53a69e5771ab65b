"""What `compare.py` does: compares methods on one base, or times their steps by size."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.comparing import plots
from jobs.comparing.comparison import Method, compare, make_method, with_memory
from jobs.comparing.options import KINDS, Options, numbers
from jobs.comparing.report import over_seeds, table, verdict
from jobs.comparing.sweep import sweep, sweep_table, sweep_verdict
from jobs.runs.base import find_base
from runtime.console import say
from runtime.device import Machine, machine_name, pick_machine
from runtime.errors import UserError
from runtime.pictures import save_picture, without_pictures
from runtime.settings.config import LORA, SHAPE, Settings
from runtime.settings.fields import settings_of
from runtime.settings.sources import Resolved
from runtime.start import command_line
from runtime.storage import folders
from runtime.storage.runs import Run, identity_of

BEST = {"lora": {"learning_rate": 8e-3}}  # of the grid in benchmarks/README.md; all others' are their defaults


def lora_settings(options: Options, explicit: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The LoRA settings to compare, by label; `explicit` are the settings that were given."""
    kinds = list(KINDS) if "all" in options.variants else options.variants
    ranks = [{"lora_rank": rank} for rank in numbers(options, "ranks")] or [{}]
    targets = [{"lora_targets": name} for name in options.targets] or [{}]
    found = {}
    for kind, target, rank in itertools.product(kinds or [""], targets, ranks):
        values = {**BEST.get(kind, {}), **explicit, "use_lora": True} | KINDS.get(kind, {}) | target | rank
        parts = [kind or options.lora_variant, f"r{Settings.from_dict(values).lora_rank}", *target.values()]
        found[" ".join(parts)] = values
    return found


def make_methods(given: Resolved, seed: int, machine: Machine, base: Run) -> list[Method]:
    """Full fine-tuning first, then each kind of LoRA."""
    names = {item.name for item in settings_of(Settings)}
    explicit = {name: getattr(given.settings, name) for name in names if given.explicit(name)}
    whole = {**explicit, "use_lora": False, "quantize": "none"}  # weights in 4 or 8 bits cannot train
    kinds = {"full": whole} | lora_settings(given.settings, explicit)
    return [make_method(label, values | {"seed": seed}, machine, base) for label, values in kinds.items()]


def save(given: Resolved, rows: list[dict[str, Any]], base: Run) -> Path:
    """results.json and, where matplotlib is installed, results.png, in a folder of their own."""
    root, name = Path(given.settings.checkpoints_dir), f"compare-{base.name}"
    folder = next(path for i in range(1, 10**6) if not (path := root / f"{name}-{i}").exists())
    about = {"base": base.name, "settings": given.settings.as_dict(), "machine": machine_name()}
    about |= {"date": time.strftime("%Y-%m-%d"), "verdict": verdict(rows), "methods": rows}
    folders.write_file(folder / "results.json", (json.dumps(about, indent=1) + "\n").encode())
    save_picture(folder / "results.png", plots.draw_comparison, rows, verdict(rows))
    if given.settings.variants:
        save_picture(folder / "kinds.png", plots.draw_kinds, rows, verdict(rows))
    return folder


def run_sweep(options: Options, machine: Machine) -> None:
    """Time every cell that this machine has no figure for yet, and show all of them."""
    widths, batches, ranks = (numbers(options, name) for name in ("widths", "batches", "ranks"))
    read = ("n_layer", "n_head", "block_size", "bias", "dropout", "test_mode")
    read += tuple(row.name for row in settings_of(Settings) if row.group == LORA and row.name != "lora_rank")
    same = {name: getattr(options, name) for name in read} | {"machine": machine_name(), "on": str(machine)}
    folder = Path(options.checkpoints_dir) / f"sweep-{identity_of(same)[:8]}"
    say(f"Timing steps on {machine}; what is measured stays in {folder}")
    cells = sweep(options, machine, widths, batches, ranks, folder / "cells.json")
    print(sweep_table(cells))
    print(sweep_verdict(cells))
    save_picture(folder / "sweep.png", plots.draw_sweep, cells, sweep_verdict(cells))
    print(f"Files: {folder}")


def run_comparison(given: Resolved, machine: Machine) -> None:
    """Adapt the base with every method and show what each came to."""
    if not (base := find_base(given.settings, [name for name in SHAPE if given.explicit(name)])):
        raise UserError(f"there is no trained base to compare on yet; train one with: {command_line('training.py')}")
    folders.check_writable(Path(given.settings.checkpoints_dir))
    runs = []
    for seed in range(given.settings.seed, given.settings.seed + given.settings.seeds):
        methods = make_methods(given, seed, machine, base)
        say(f"Comparing {', '.join(method.label for method in methods)} on {base.name}, {machine}, seed {seed}")
        runs.append(compare(methods, base, machine))
    rows = with_memory(over_seeds(runs), methods, machine)
    print(table(rows))
    print(verdict(rows))
    print(f"Files: {save(given, rows, base)}")


def run(given: Resolved) -> None:
    """What `compare.py` does."""
    machine = pick_machine(given.settings.device, given.settings.dtype)
    notes = (f"There will be no picture: {needed}" for needed in [without_pictures()] if needed)
    for note in (*machine.notes, *notes):
        say(note)
    if given.settings.sweep:
        run_sweep(given.settings, machine)
    else:
        run_comparison(given, machine)
