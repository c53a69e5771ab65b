"""Compare full fine-tuning with LoRA: one base, the same batches, steps in turn, everything measured here.

python compare.py                        full against LoRA of ranks 4, 8, 16 and 32, on the First Folio
python compare.py --ranks 8 --targets minimal --targets all --max-iters 300
python compare.py --sweep                from which width, rank and batch on a LoRA step is the faster one here
TEST_MODE=True python compare.py         a quick look at either
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.base import find_base
from jobs.comparison import Method, base_windows, make_method, row, untouched
from jobs.memory import peak_memory
from jobs.sweep import sweep, sweep_table, sweep_verdict
from runtime import report, storage
from runtime.checkpoint import Run, identity_of, say
from runtime.config import LORA, Settings, from_command_line
from runtime.device import Machine, machine_name, pick_machine
from runtime.errors import UsageError, UserError, run_command
from runtime.fields import setting, settings_of
from runtime.metrics import Progress
from runtime.sources import Resolved
from runtime.steps import evaluate

COMPARED = "What to compare"
NUMBERS = r"[0-9]{1,4}( *, *[0-9]{1,4})*"


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The flags of compare.py, beside all settings of a training run."""

    ranks: str = setting(
        "4,8,16,32", "LoRA ranks, with commas between them", test="8", group=COMPARED, env=False, pattern=NUMBERS,
        allowed="whole numbers with commas between them",
    )  # fmt: skip
    targets: tuple[str, ...] = setting((), "LORA_TARGETS to compare; may be repeated", group=COMPARED, env=False)
    variants: tuple[str, ...] = setting((), "LORA_VARIANT to compare; may be repeated", group=COMPARED, env=False)
    sweep: bool = setting(False, "Time steps over widths, ranks and batches instead", group=COMPARED, env=False)
    widths: str = setting(
        "64,128,256,384", "Values of N_EMBD to sweep", test="64,128", group=COMPARED, env=False, pattern=NUMBERS,
        allowed="whole numbers with commas between them",
    )  # fmt: skip
    batches: str = setting(
        "4,16,64", "Values of BATCH_SIZE to sweep", test="4,16", group=COMPARED, env=False, pattern=NUMBERS,
        allowed="whole numbers with commas between them",
    )  # fmt: skip

    @classmethod
    def modes(cls, values: Mapping[str, Any]) -> list[str]:
        """A comparison adapts a base, whether or not BASE names it."""
        return [*super().modes(dict(values) | {"base": values["base"] or "newest"})]


def numbers(options: Options, name: str) -> list[int]:
    """The numbers of a list such as RANKS, once each. Raises UsageError for one that is not above 0."""
    found = list(dict.fromkeys(map(int, getattr(options, name).split(","))))
    if min(found) < 1:
        raise UsageError(f"--{name} {getattr(options, name)}: every number must be at least 1")
    return found


def lora_settings(options: Options) -> dict[str, dict[str, Any]]:
    """The LoRA settings to compare, by label."""
    found = {}
    for variant in options.variants or (options.lora_variant,):
        for targets in options.targets or (options.lora_targets,):
            for rank in numbers(options, "ranks"):
                parts = [variant if options.variants else "lora", f"r{rank}", *([targets] if options.targets else [])]
                values = {"lora_rank": rank, "lora_targets": targets, "lora_variant": variant}
                found[" ".join(parts)] = values | {"use_lora": True}
    return found


def make_methods(given: Resolved, machine: Machine, base: Run) -> list[Method]:
    """Full fine-tuning first, then each kind of LoRA."""
    names = {item.name for item in settings_of(Settings)}
    explicit = {name: getattr(given.settings, name) for name in names if given.explicit(name)}
    kinds = {"full": {"use_lora": False}} | lora_settings(given.settings)
    return [make_method(label, explicit | values, machine, base) for label, values in kinds.items()]


def take_steps(methods: list[Method]) -> None:
    """All steps of all methods, a step each in turn, so that what disturbs the machine disturbs all alike."""
    s = methods[0].job.settings
    progress = Progress("compare", s.max_iters, 0)
    for method in methods:
        method.evaluate(0)
    for step in range(s.max_iters):
        for method in methods:
            method.step(step)
        done = step + 1
        if done % s.eval_interval == 0 or done == s.max_iters:
            losses = {method.label: f"{method.evaluate(done):.3f}" for method in methods}
            progress.update(done, **losses)
        progress.update(done)
    progress.close()


def compare(methods: list[Method], base: Run, machine: Machine) -> list[dict[str, Any]]:
    """Run the comparison; one row of results a method."""
    windows = base_windows(methods[0].job, base)
    before = untouched(methods[0], windows)
    take_steps(methods)
    say("Measuring memory, a fresh process for each method ...")
    peaks = [None if machine.device.type == "mps" else peak_memory(method.job.settings) for method in methods]
    seconds = min(method.curve[-1][1] for method in methods)
    return [
        row(method, seconds, (before, evaluate(method.job.model, windows, machine)), peak)
        for method, peak in zip(methods, peaks, strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as people read them."""
    head = (
        "",
        "trainable",
        "%",
        "ms/step",
        "fwd",
        "bwd",
        "opt",
        "tokens/s",
        "memory",
        "file",
        "loss",
        "=time",
        "forgets",
    )
    lines = [head]
    for r in rows:
        times = [f"{r['milliseconds'][key]:.1f}" for key in ("step", "forward", "backward", "optimizer")]
        sizes = [report.size(r["peak_memory"]), report.size(r["file_bytes"])]
        forgets = f"{r['base_text_loss_after'] - r['base_text_loss_before']:+.3f}"
        losses = [f"{r['loss_at_equal_steps']:.3f}", f"{r['loss_at_equal_seconds']:.3f}", forgets]
        parts = [r["method"], f"{r['trainable']:,}", f"{r['trainable_percent']:.1f}", *times]
        lines.append((*parts, f"{r['tokens_per_second']:,.0f}", *sizes, *losses))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """One line in plain words on the LoRA that ends with the lowest loss, also where it does not pay."""
    full, best = rows[0], min(rows[1:], key=lambda r: r["loss_at_equal_steps"])
    step = best["milliseconds"]["step"] / full["milliseconds"]["step"]
    memory = f" and {best['peak_memory'] / full['peak_memory']:.2f} of its memory" if full["peak_memory"] else ""
    gained = (full["loss_before"] - best["loss_at_equal_steps"]) / (full["loss_before"] - full["loss_at_equal_steps"])
    pays = "LoRA pays here" if step < 1 else "LoRA does not pay in time here"
    return (
        f"{pays}: {best['method']} trains {best['trainable_percent']:.1f} % of the parameters, takes {step:.2f} of "
        f"full fine-tuning's time a step{memory}, and reaches {100 * gained:.0f} % of its gain in loss."
    )


def save_picture(file: Path, draw: str, *what: Any) -> None:
    """Draw with a function of `jobs.plots`, where matplotlib is installed."""
    try:
        from jobs import plots
    except ImportError:
        say("No picture: matplotlib is not installed; get it with: pip install -r requirements-plots.txt")
    else:
        storage.write_file(file, getattr(plots, draw)(*what))


def save(given: Resolved, rows: list[dict[str, Any]], base: Run) -> Path:
    """results.json and, where matplotlib is installed, results.png, in a folder of their own."""
    root, name = Path(given.settings.checkpoints_dir), f"compare-{base.name}"
    folder = next(path for i in range(1, 10**6) if not (path := root / f"{name}-{i}").exists())
    about = {"base": base.name, "settings": given.settings.as_dict(), "machine": machine_name()}
    about |= {"date": time.strftime("%Y-%m-%d"), "verdict": verdict(rows), "methods": rows}
    storage.write_file(folder / "results.json", (json.dumps(about, indent=1) + "\n").encode())
    save_picture(folder / "results.png", "draw_comparison", rows, verdict(rows))
    return folder


def run_sweep(options: Options, machine: Machine) -> None:
    """Time every cell that this machine has no figure for yet, and show all of them."""
    widths, batches, ranks = (numbers(options, name) for name in ("widths", "batches", "ranks"))
    if odd := [width for width in widths if width % options.n_head]:
        raise UsageError(f"--widths {options.widths}: {odd[0]} is not a multiple of N_HEAD={options.n_head}")
    read = ("n_layer", "n_head", "block_size", "bias", "dropout", "test_mode")
    read += tuple(row.name for row in settings_of(Settings) if row.rule.group == LORA and row.name != "lora_rank")
    same = {name: getattr(options, name) for name in read} | {"machine": machine_name(), "on": str(machine)}
    folder = Path(options.checkpoints_dir) / f"sweep-{identity_of(same)[:8]}"
    say(f"Timing steps on {machine}; what is measured stays in {folder}")
    cells = sweep(options, machine, widths, batches, ranks, folder / "cells.json")
    print(sweep_table(cells))
    print(sweep_verdict(cells))
    save_picture(folder / "sweep.png", "draw_sweep", cells, sweep_verdict(cells))
    print(f"Files: {folder}")


def run_comparison(given: Resolved, machine: Machine) -> None:
    """Adapt the base with every method and show what each came to."""
    if not (base := find_base(given.settings)):
        raise UserError("there is no trained base to compare on yet; train one with: python training.py")
    methods = make_methods(given, machine, base)
    say(f"Comparing {', '.join(method.label for method in methods)} on {base.name}, {machine}")
    rows = compare(methods, base, machine)
    print(table(rows))
    print(verdict(rows))
    print(f"Files: {save(given, rows, base)}")


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    machine = pick_machine(given.settings.device, given.settings.dtype)
    for note in machine.notes:
        say(note)
    if given.settings.sweep:
        run_sweep(given.settings, machine)
    else:
        run_comparison(given, machine)


if __name__ == "__main__":
    run_command(main)
