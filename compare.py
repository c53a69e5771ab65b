"""Compare full fine-tuning with LoRA: one base, the same batches, steps in turn, everything measured here.

python compare.py                        full against LoRA of ranks 4, 8, 16 and 32, on the First Folio
python compare.py --ranks 8 --targets minimal --targets all --max-iters 300
python compare.py --variants all         every kind of adapter, with three seeds
python compare.py --sweep                from which width, rank and batch on a LoRA step is the faster one here
TEST_MODE=True python compare.py         a quick look at either
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.comparing import plots
from jobs.comparing.comparison import Method, compare, make_method, with_memory
from jobs.comparing.report import over_seeds, table, verdict
from jobs.comparing.sweep import sweep, sweep_table, sweep_verdict
from jobs.runs.base import find_base
from jobs.runs.preflight import check_writable
from lora.variants.registry import VARIANTS
from runtime.console import say
from runtime.device import Machine, machine_name, pick_machine
from runtime.errors import UsageError, UserError
from runtime.pictures import save_picture, without_pictures
from runtime.processes.command import run_command
from runtime.settings.config import LORA, PRESETS, SHAPE, Settings, from_command_line
from runtime.settings.fields import setting, settings_of
from runtime.settings.sources import Resolved
from runtime.start import command_line
from runtime.storage import folders
from runtime.storage.runs import Run, identity_of

COMPARED = "What to compare"
NUMBERS = r"[0-9]{1,4}( *, *[0-9]{1,4})*"
SWEPT = {"group": COMPARED, "env": False, "pattern": NUMBERS, "allowed": "whole numbers separated by commas"}
INSTEAD = {  # flags of training.py that a comparison would ignore: what to do instead
    "use_lora": "it always compares both",
    "lora_rank": "name the ranks with --ranks",
    "run_name": "its folder is named after the base",
    "fresh": "each comparison gets a folder of its own",
    "dry_run": "training.py tells it, of one method at a time",
    "force": "it asks for no memory beforehand",
    "patience": "all methods take all steps",
    "save_interval": "it saves no checkpoints",
    "keep_checkpoints": "it saves no checkpoints",
    "track": "its files tell all of it",
    **dict.fromkeys(("push_to_hub", "push_strategy", "push_private"), "it makes nothing to push"),
}
BEST = {"lora": {"learning_rate": 8e-3}}  # of the grid in benchmarks/README.md; all others' are their defaults
PLAIN, *OTHERS = ({"lora_variant": name} for name in VARIANTS)
KINDS = {"lora": PLAIN | {"lora_plus_ratio": 1.0}, "lora+": PLAIN} | {kind["lora_variant"]: kind for kind in OTHERS}


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The flags of compare.py, beside all settings of a training run."""

    presets: ClassVar = PRESETS | {
        "TEST_MODE": PRESETS["TEST_MODE"] | {"ranks": "8", "widths": "64,128", "batches": "4,16"},
        "--variants": {"ranks": "", "seeds": 3},
        "a pretrained base": PRESETS["a pretrained base"] | {"ranks": "16"},
    }

    ranks: str = setting(
        "4,8,16,32", "LoRA ranks, separated by commas; if empty, the default of each variant", env=False,
        group=COMPARED, pattern=f"|{NUMBERS}", allowed="whole numbers separated by commas",
    )  # fmt: skip
    targets: tuple[str, ...] = setting((), "LORA_TARGETS to compare; may be repeated", group=COMPARED, env=False)
    variants: tuple[str, ...] = setting(
        (), "Kind of adapter to compare, as in LORA_VARIANT; lora is without LoRA+, lora+ and all others with it; all "
        "compares every kind; may be repeated", group=COMPARED, env=False,
        pattern="|".join(map(re.escape, (*KINDS, "all"))), allowed=f"one of {', '.join(KINDS)}, all",
    )  # fmt: skip
    seeds: int = setting(1, "Number of seeds, from SEED upwards", group=COMPARED, env=False, low=1, high=100)
    sweep: bool = setting(False, "Time training steps by width, rank and batch size instead", group=COMPARED, env=False)
    widths: str = setting("64,128,256,384", "Values of N_EMBD for --sweep", **SWEPT)
    batches: str = setting("4,16,64", "Values of BATCH_SIZE for --sweep", **SWEPT)

    @classmethod
    def active(cls, values: Mapping[str, Any]) -> set[str]:
        """A comparison adapts a base, whether or not BASE names it."""
        variants = {"--variants"} if values["variants"] else set()
        return super().active(values) | {"from a base"} | variants


def numbers(options: Options, name: str) -> list[int]:
    """The numbers of a list such as RANKS, once each. Raises UsageError for one that is not above 0."""
    found = list(dict.fromkeys(map(int, getattr(options, name).split(","))))
    if min(found) < 1:
        raise UsageError(f"--{name} {getattr(options, name)}: every number must be at least 1")
    return found


def lora_settings(options: Options, explicit: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The LoRA settings to compare, by label; `explicit` are the settings that were given."""
    kinds = list(KINDS) if "all" in options.variants else options.variants
    ranks = [{"lora_rank": rank} for rank in numbers(options, "ranks")] if options.ranks else [{}]
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
    if odd := [width for width in widths if width % options.n_head]:
        raise UsageError(f"--widths {options.widths}: {odd[0]} is not a multiple of N_HEAD={options.n_head}")
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
    check_writable(Path(given.settings.checkpoints_dir))
    runs = []
    for seed in range(given.settings.seed, given.settings.seed + given.settings.seeds):
        methods = make_methods(given, seed, machine, base)
        say(f"Comparing {', '.join(method.label for method in methods)} on {base.name}, {machine}, seed {seed}")
        runs.append(compare(methods, base, machine))
    rows = with_memory(over_seeds(runs), methods, machine)
    print(table(rows))
    print(verdict(rows))
    print(f"Files: {save(given, rows, base)}")


def check_flags(given: Resolved) -> None:
    """Raises UsageError for a flag that a comparison would ignore; in the environment it may be meant for others."""
    for name, instead in INSTEAD.items():
        if name == "lora_rank" and not given.settings.ranks:
            continue
        if given.sources.get(name.upper(), "").startswith("flag"):
            raise UsageError(f"compare.py does not take --{name.replace('_', '-')}: {instead}")


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check_flags(given)
    machine = pick_machine(given.settings.device, given.settings.dtype)
    notes = (f"There will be no picture: {needed}" for needed in [without_pictures()] if needed)
    for note in (*machine.notes, *notes):
        say(note)
    if given.settings.sweep:
        run_sweep(given.settings, machine)
    else:
        run_comparison(given, machine)


if __name__ == "__main__":
    run_command(main)
