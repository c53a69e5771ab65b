"""What the commands of `adapters.py` do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.adapting import forgetting, making, plots, report
from jobs.adapting.adapted import Adapted, Base, held_out, open_adapters, texts_of
from jobs.adapting.checkup import Checkup
from jobs.adapting.options import (
    Check,
    Combine,
    Command,
    Diff,
    Import,
    Inspect,
    List,
    Merge,
    Quantize,
    Remove,
    Strength,
    numbers,
)  # fmt: skip
from jobs.runs.family import orphaned_by, remove_runs
from models.files import form_of
from models.pretrained.source import find_source
from runtime.console import say
from runtime.device import pick_machine
from runtime.errors import UsageError, UserError
from runtime.pictures import save_picture
from runtime.report import size
from runtime.start import command_line
from runtime.storage import folders
from runtime.storage.runs import all_runs, suggest
from runtime.training.batch import Batch


def picture(folder: Path, name: str, out: str, draw: Callable, *what: Any) -> None:
    """Draw where it was asked to be, or under the next free name in the run's folder."""
    free = (folder / f"{name}{f'-{i}' if i > 1 else ''}.png" for i in range(1, 10**6))
    path = Path(out) if out else next(path for path in free if not path.exists())
    folders.check_free(path)
    if save_picture(path, draw, *what):
        print(f"Picture: {path}")


def text_for(adapted: Adapted, dataset: str) -> str:
    """The text to verify on. Raises UserError where none is known."""
    for text in (dataset, *texts_of(adapted.run), *texts_of(adapted.base.run)):
        if text:
            return text
    raise UserError(f"{adapted.run.name} does not tell what it was trained on; name a text with --dataset")


def list_runs(options: List) -> None:
    """Print every run."""
    print(report.list_runs(options.root))


def inspect(options: Inspect) -> None:
    """Print how much each module is changed, and draw it."""
    (adapted,) = open_adapters(options.root, (options.name,))
    found = report.sizes(adapted)
    print(report.inspected(adapted, found))
    title = f"What {options.name} changes in {adapted.base.run.name}"
    picture(adapted.run.folder, "inspect", options.out, plots.draw_sizes, found, title)


def diff(options: Diff) -> None:
    """Print how alike two adapters' changes are."""
    print(report.compared(*open_adapters(options.root, (options.one, options.other))))


def strength(options: Strength) -> None:
    """Measure what an adapter gains on its text and what its base forgets, print and draw it."""
    machine = pick_machine(options.device, options.dtype)
    (adapted,) = open_adapters(options.root, (options.name,))
    strengths, roles = numbers(options.strengths or "1"), forgetting.texts_to_measure(adapted, options.dataset)
    losses = forgetting.measure(adapted, list(roles), strengths, options.eval_iters, Path(options.data_dir), machine)
    print(forgetting.told(roles, strengths, losses))
    title = f"{options.name}: what it gains and what the base forgets"
    picture(adapted.run.folder, "strength", options.out, plots.draw_strengths, strengths, losses, roles, title)


def dense(options: Merge, adapted: Adapted, form: str, windows: list[Batch]) -> Adapted:
    """The adapter on the weights that `--onto` names; tells the loss on each that there is.

    Raises UsageError where these are not there.
    """
    choices, machine = making.dense_bases(adapted), pick_machine(options.device, options.dtype)
    print(f"{options.name} was trained on {adapted.base.run.name} in {form}. Loss on held-out text with the adapter:")
    for name, choice in {form: adapted, **choices}.items():
        print(f"   on the weights in {name}: " if name == form else f"   on the {name} weights: ", end="", flush=True)
        print(f"{making.loss_with(choice, windows, machine):.4f}", flush=True)
    if options.onto not in choices:
        raise UsageError(f"--onto {options.onto}: {adapted.base.run.artifact} is stored in {form} and has no others")
    return choices[options.onto]


def merge(options: Merge) -> None:
    """Merge an adapter into its base, and tell how far the logits of what was written are off."""
    (adapted,) = open_adapters(options.root, (options.name,))
    text = text_for(adapted, options.dataset)
    windows = held_out(text, adapted.run, adapted.base, Path(options.data_dir), 4)
    how = {}
    if (form := form_of(adapted.base.model)) != "none":
        adapted, how = dense(options, adapted, form, windows), {"trained_on": form, "onto": options.onto}
    run, difference = making.merge_run(adapted, options.place, windows[0], **how)
    print(f"{run.artifact}: {adapted.base.run.name} with {options.name} merged into it")
    if (off := difference.found) > making.TOLERANCE:
        dtype = str(adapted.base.model.token_embedding.weight.dtype).removeprefix("torch.")
        told = f"{off:.1e} of the largest, which is what rounding the weights to {dtype} costs, as its base has them"
    else:
        told = f"{off:.1e} of the largest (up to {making.TOLERANCE:g} is rounding)"
    print(f"Verified on held-out text of {Path(text).name}: its logits differ from base and adapter by {told}")
    print(f"➡️  Next: {command_line('generate.py', '--run', run.name)}")


def quantize(options: Quantize) -> None:
    """Write a base in 4 or 8 bits."""
    base = Base.of(find_source(options.root, options.name), form=options.form)
    run = making.quantize_run(base, options.place)
    sizes = [sum(path.stat().st_size for path in made.artifact.glob("*.safetensors")) for made in (base.run, run)]
    print(f"{run.artifact}: {base.run.name} in {options.form}, {size(sizes[1])} instead of {size(sizes[0])}")
    print(f"➡️  Next: {command_line('training.py', '--use-lora', '--base', run.name)}")


def combine(options: Combine) -> None:
    """Add adapters up."""
    weights = numbers(options.weights) if options.weights else [1 / len(options.names)] * len(options.names)
    made = making.combine_runs(
        open_adapters(options.root, options.names), weights, options.method, options.rank, options.place
    )
    terms = " + ".join(f"{weight:g} x {name}" for weight, name in zip(weights, options.names, strict=True))
    print(f"{options.place}: {terms}, by {options.method}, rank {report.ranks_in_words(made.adapter)}")
    if options.method == "svd":
        path, worst = max(made.errors.items(), key=lambda item: item[1])
        print(f"Relative error of the change (Frobenius): {made.error:.4f}; most in {path}, {worst:.4f}")
    print(f"➡️  Next: {command_line('generate.py', '--run', options.out)}")


def check(options: Check) -> None:
    """Print every problem there is. Raises UserError where there is one."""
    found = Checkup(options.root, options.base).path(options.place)
    for note in found.notes:
        say(f"Note: {note}")
    for problem in found.problems:
        print(problem)
    if found.problems:
        raise UserError(f"{options.path}: {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}")
    print(f"{options.path}: good ({'; '.join(found.checked)})")


def bring_in(options: Import) -> None:
    """Make a run of an adapter's folder."""
    adapter = making.import_folder(Path(options.folder), Base.open(options.root, options.base), options.place)
    told = f"rank {report.ranks_in_words(adapter)} on {len(adapter.targets())} modules"
    print(f"{options.place}: {options.folder} as an adapter of {options.base}, {told}")
    print(f"➡️  Next: {command_line('generate.py', '--run', options.out)}")


def remove(options: Remove) -> None:
    """Remove runs. Raises UsageError for a name that is none, and without --yes."""
    there = all_runs(options.root)
    for name in options.names:
        if name not in [run.name for run in there]:
            raise UsageError(f"there is no run {name!r} in {options.root}; {suggest(name, there, 'runs')}")
    runs = [run for run in there if run.name in options.names]
    lost = ", ".join(run.name for run in orphaned_by(runs, there))
    told = f"{', '.join(run.name for run in runs)}{f', and leaves without a base: {lost}' if lost else ''}"
    if not options.yes:
        raise UsageError(f"nothing is removed without --yes; it removes {told}")
    remove_runs(runs)
    print(f"Removed {told}")


WORK: dict[type[Command], Callable[[Any], None]] = {
    List: list_runs,
    Inspect: inspect,
    Diff: diff,
    Strength: strength,
    Merge: merge,
    Quantize: quantize,
    Combine: combine,
    Check: check,
    Import: bring_in,
    Remove: remove,
}


def run(options: Command) -> None:
    """Do what the command is for."""
    WORK[type(options)](options)
