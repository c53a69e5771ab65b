"""Look at adapters, check them, merge and combine them, and take them to PEFT and back.

python adapters.py list                           every run and adapter there is
python adapters.py inspect lora-folio-r8          how much each module changes: a table and a picture
python adapters.py diff lora-folio-r8 other       how alike two adapters' changes are
python adapters.py strength lora-folio-r8         what the adapter gains on its text and loses on the base's
python adapters.py merge lora-folio-r8 --out folio                        a model that needs no adapter
python adapters.py combine lora-folio-r8 other --weights 0.5,0.5 --out both
python adapters.py check checkpoints/lora-folio-r8                        everything that can be wrong with files
python adapters.py export lora-folio-r8 --out folder                      a folder that PEFT reads
python adapters.py import folder --base base-shakespeare --out name       and one that PEFT wrote

python adapters.py COMMAND --help tells what each takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import adapter_making as making
from jobs import adapter_options as options
from jobs import adapter_report, forgetting
from jobs.adapters import Adapted, Base, check_free, held_out, open_adapters, texts_of
from jobs.checkup import Checkup
from runtime import storage
from runtime.checkpoint import say
from runtime.config import from_command_line
from runtime.device import pick_machine
from runtime.errors import UsageError, UserError, run_command
from runtime.fields import Table
from runtime.flags import subcommand


def numbers(text: str) -> list[float]:
    """The numbers of a text with commas between them."""
    return [float(part) for part in text.split(",")]


def root_of(o: options.Machine) -> Path:
    """The folder of the runs."""
    return Path(o.checkpoints_dir)


def save_picture(folder: Path, name: str, out: str, draw: Callable[[], bytes]) -> None:
    """Write a picture where it was asked to be, or under the next free name in the run's folder."""
    free = (folder / f"{name}{f'-{i}' if i > 1 else ''}.png" for i in range(1, 10**6))
    path = Path(out) if out else next(path for path in free if not path.exists())
    try:
        data = draw()
    except ImportError:
        say("No picture: matplotlib is not installed; get it with: pip install -r requirements-plots.txt")
        return
    check_free(path)
    storage.write_file(path, data)
    print(f"Picture: {path}")


def list_runs(o: options.List) -> None:
    """Every run and adapter: its base, what it is made of, what it was trained on, its loss and size."""
    print(adapter_report.list_runs(root_of(o)))


def inspect(o: options.Inspect) -> None:
    """How much an adapter changes each module, as a table and a picture."""
    if o.out:
        check_free(Path(o.out))
    (adapted,) = open_adapters(root_of(o), (o.name,))
    found = adapter_report.sizes(adapted)
    print(adapter_report.inspected(adapted, found))

    def draw() -> bytes:
        from jobs.adapter_plots import draw_sizes

        return draw_sizes(found, f"What {o.name} changes in {adapted.base.run.name}")

    save_picture(adapted.run.folder, "inspect", o.out, draw)


def diff(o: options.Diff) -> None:
    """The cosine between two adapters' changes, module by module: 1 the same direction, 0 unrelated, -1 opposite."""
    print(adapter_report.compared(*open_adapters(root_of(o), (o.one, o.other))))


def strength(o: options.Strength) -> None:
    """The forgetting meter: held-out loss on the adapter's text and on the base's, at several strengths."""
    if o.out:
        check_free(Path(o.out))
    machine = pick_machine(o.device, o.dtype)
    (adapted,) = open_adapters(root_of(o), (o.name,))
    strengths, roles = numbers(o.strengths or "1"), forgetting.texts_to_measure(adapted, o.dataset)
    losses = forgetting.measure(adapted, list(roles), strengths, o.eval_iters, Path(o.data_dir), machine)
    print(forgetting.told(roles, strengths, losses))

    def draw() -> bytes:
        from jobs.adapter_plots import draw_strengths

        return draw_strengths(strengths, losses, roles, f"{o.name}: what it gains and what the base forgets")

    save_picture(adapted.run.folder, "strength", o.out, draw)


def text_for(adapted: Adapted, dataset: str) -> str:
    """The text to verify on. Raises UserError where none is known."""
    for text in (dataset, *texts_of(adapted.run), *texts_of(adapted.base.run)):
        if text:
            return text
    raise UserError(f"{adapted.run.name} does not tell what it was trained on; name a text with --dataset")


def merge(o: options.Merge) -> None:
    """Write an adapter into its base's weights, as a new run that needs no adapter, and verify what was written."""
    root = root_of(o)
    check_free(root / o.out)
    (adapted,) = open_adapters(root, (o.name,))
    text = text_for(adapted, o.dataset)
    windows = held_out(text, adapted.base, Path(o.data_dir), 1)
    run, difference = making.merge_run(adapted, root / o.out, windows)
    print(f"{run.product}: {adapted.base.run.name} with {o.name} merged into it")
    told = f"{difference:.1e} of the largest (up to {making.TOLERANCE:g} is rounding)"
    print(f"Verified on held-out text of {Path(text).name}: its logits differ from base and adapter by {told}")
    print(f"➡️  Next: python generate.py --run {run.name}")


def combine(o: options.Combine) -> None:
    """A new adapter that changes the base by the weighted sum of what others change."""
    root = root_of(o)
    weights = numbers(o.weights) if o.weights else [1 / len(o.names)] * len(o.names)
    if len(weights) != len(o.names):
        raise UsageError(f"--weights {o.weights}: {len(weights)} for {len(o.names)} adapters; one for each is needed")
    if (o.method == "svd") != (o.rank is not None):
        raise UsageError("--method svd needs --rank" if o.rank is None else f"--method {o.method} takes no --rank")
    check_free(root / o.out)
    made = making.combine_runs(open_adapters(root, o.names), weights, o.method, o.rank, root / o.out)
    terms = " + ".join(f"{weight:g} x {name}" for weight, name in zip(weights, o.names, strict=True))
    print(f"{root / o.out}: {terms}, by {o.method}, rank {adapter_report.ranks_in_words(made.adapter)}")
    if o.method == "svd":
        path, worst = max(made.errors.items(), key=lambda item: item[1])
        print(f"Relative error of the change (Frobenius): {made.error:.4f}; most in {path}, {worst:.4f}")
    print(f"➡️  Next: python generate.py --run {o.out}")


def check(o: options.Check) -> None:
    """Everything that loading checks, without putting it to use; every problem is named, and the status is 1."""
    path = Path(o.path)
    found = Checkup(root_of(o), o.base).path(path if path.exists() else root_of(o) / o.path)
    for note in found.notes:
        say(f"Note: {note}")
    for problem in found.problems:
        print(problem)
    if found.problems:
        raise UserError(f"{o.path}: {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}")
    print(f"{o.path}: good ({'; '.join(found.checked)})")


def import_folder(o: options.Import) -> None:
    """An adapter's folder, PEFT's or ours, as a LoRA run on a base that is here."""
    root = root_of(o)
    check_free(root / o.out)
    adapter = making.import_folder(Path(o.folder), Base.open(root, o.base), root / o.out)
    told = f"rank {adapter_report.ranks_in_words(adapter)} on {len(adapter.targets())} modules"
    print(f"{root / o.out}: {o.folder} as an adapter of {o.base}, {told}")
    print(f"➡️  Next: python generate.py --run {o.out}")


def export_folder(o: options.Export) -> None:
    """An adapter as a folder that PEFT reads."""
    check_free(Path(o.out))
    (adapted,) = open_adapters(root_of(o), (o.name,))
    making.export_folder(adapted, Path(o.out))
    print(f"{o.out}: {o.name} as PEFT reads it, peft.PeftModel.from_pretrained(model, {o.out!r})")


COMMANDS: dict[str, tuple[type[Table], Callable[[Any], None]]] = {
    "list": (options.List, list_runs),
    "inspect": (options.Inspect, inspect),
    "diff": (options.Diff, diff),
    "strength": (options.Strength, strength),
    "merge": (options.Merge, merge),
    "combine": (options.Combine, combine),
    "check": (options.Check, check),
    "import": (options.Import, import_folder),
    "export": (options.Export, export_folder),
}


def main() -> None:
    """Run the command."""
    word = subcommand(sys.argv[1:], COMMANDS, __doc__)
    table, act = COMMANDS[word]
    act(from_command_line(table, act.__doc__, word).settings)


if __name__ == "__main__":
    run_command(main)
