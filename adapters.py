"""Look at adapters, check them, merge and combine them, and bring them in from PEFT.

python adapters.py list                           every run and adapter there is
python adapters.py inspect lora-folio-r8          how much each module changes: a table and a picture
python adapters.py diff lora-folio-r8 other       how alike two adapters' changes are
python adapters.py strength lora-folio-r8         what the adapter gains on its text and loses on the base's
python adapters.py merge lora-folio-r8 --out folio                        a model that needs no adapter
python adapters.py quantize base-shakespeare --out small                  a base whose files are in 4 bits
python adapters.py combine lora-folio-r8 other --weights 0.5,0.5 --out both
python adapters.py check checkpoints/lora-folio-r8                        everything that can be wrong with files
python adapters.py import folder --base base-shakespeare --out name       a folder that PEFT wrote
python adapters.py remove folio both --yes         runs that are no longer needed

python adapters.py COMMAND --help tells what each takes. To PEFT, vLLM, llama.cpp and others: export.py.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.adapting import forgetting, making, plots, report
from jobs.adapting.adapted import Adapted, Base, check_free, held_out, open_adapters, texts_of
from jobs.adapting.checkup import Checkup
from jobs.runs.family import orphaned_by, remove_runs
from models.files import form_of
from models.pretrained.source import find_source
from runtime.console import say
from runtime.device import pick_machine
from runtime.errors import UsageError, UserError
from runtime.pictures import save_picture, without_pictures
from runtime.processes.command import run_command
from runtime.report import size
from runtime.settings.config import FOLDER, NAME, NAMED, CommonSettings, from_command_line
from runtime.settings.fields import setting
from runtime.settings.flags import subcommand
from runtime.start import command_line
from runtime.storage.runs import all_runs, suggest
from runtime.training.batch import Batch

WHAT = "What to do"
NUMBER = r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,2})?"
ONLY_HERE = {"group": WHAT, "env": False}
NUMBERS = {"pattern": rf"|{NUMBER}( *, *{NUMBER})*", "allowed": "numbers with commas between them", **ONLY_HERE}
A_NAME = {"pattern": rf"|{NAME}", "allowed": f"a run's name, not a path: {NAMED}", **ONLY_HERE}
A_PATH = {"pattern": rf"|{FOLDER}", "path": True, "allowed": "a path", **ONLY_HERE}
A_BASE = A_PATH | {"allowed": "a run's name, a Hugging Face folder, or a name on their hub"}
A_TEXT = A_PATH | {"allowed": "the name of a corpus or a path"}


def numbers(text: str) -> list[float]:
    """The numbers of a text with commas between them."""
    return [float(part) for part in text.split(",")]


def check_picture(out: str) -> None:
    """Raises UsageError where a picture was asked for that could not be drawn, or not be written there."""
    if out:
        check_free(Path(out))
        if needed := without_pictures():
            raise UsageError(f"--out {out}: {needed}")


def picture(folder: Path, name: str, out: str, draw: Callable, *what: Any) -> None:
    """Draw where it was asked to be, or under the next free name in the run's folder."""
    free = (folder / f"{name}{f'-{i}' if i > 1 else ''}.png" for i in range(1, 10**6))
    path = Path(out) if out else next(path for path in free if not path.exists())
    check_free(path)
    if save_picture(path, draw, *what):
        print(f"Picture: {path}")


def text_for(adapted: Adapted, dataset: str) -> str:
    """The text to verify on. Raises UserError where none is known."""
    for text in (dataset, *texts_of(adapted.run), *texts_of(adapted.base.run)):
        if text:
            return text
    raise UserError(f"{adapted.run.name} does not tell what it was trained on; name a text with --dataset")


@dataclass(frozen=True, kw_only=True)
class Command(CommonSettings):
    """A command of adapters.py: its arguments, and what it does with them."""

    @property
    def root(self) -> Path:
        """The folder of the runs."""
        return Path(self.checkpoints_dir)

    def run(self) -> None:
        """Do it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """Every run, below its base: variant and rank, targets, text, tokenizer, steps, losses, when it finished.

    loss: nats per token of held-out text; bits: per character of it, which compares across tokenizers.
    """

    def run(self) -> None:
        print(report.list_runs(self.root))


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """How much an adapter changes each module, as a table and a picture."""

    name: str = setting("", "The LoRA run to look into", metavar="NAME", **A_NAME)
    out: str = setting("", "File for the picture; empty puts it into the run's folder", **A_PATH)

    def run(self) -> None:
        check_picture(self.out)
        (adapted,) = open_adapters(self.root, (self.name,))
        found = report.sizes(adapted)
        print(report.inspected(adapted, found))
        title = f"What {self.name} changes in {adapted.base.run.name}"
        picture(adapted.run.folder, "inspect", self.out, plots.draw_sizes, found, title)


@dataclass(frozen=True, kw_only=True)
class Diff(Command):
    """The cosine between two adapters' changes, module by module: 1 the same direction, 0 unrelated, -1 opposite."""

    one: str = setting("", "A LoRA run", metavar="A", **A_NAME)
    other: str = setting("", "Another on the same base", metavar="B", **A_NAME)

    def run(self) -> None:
        print(report.compared(*open_adapters(self.root, (self.one, self.other))))


@dataclass(frozen=True, kw_only=True)
class Strength(Inspect):
    """The forgetting meter: held-out loss on the adapter's text and on the base's, at several strengths."""

    strengths: str = setting("0,0.25,0.5,0.75,1", "Strengths to measure at", **NUMBERS)
    dataset: str = setting("", "The adapter's text; empty takes the one it was trained on", **A_TEXT)
    eval_iters: int = setting(40, "Batches of held-out text", low=1, **ONLY_HERE)

    def run(self) -> None:
        check_picture(self.out)
        machine = pick_machine(self.device, self.dtype)
        (adapted,) = open_adapters(self.root, (self.name,))
        strengths, roles = numbers(self.strengths or "1"), forgetting.texts_to_measure(adapted, self.dataset)
        losses = forgetting.measure(adapted, list(roles), strengths, self.eval_iters, Path(self.data_dir), machine)
        print(forgetting.told(roles, strengths, losses))
        title = f"{self.name}: what it gains and what the base forgets"
        picture(adapted.run.folder, "strength", self.out, plots.draw_strengths, strengths, losses, roles, title)


@dataclass(frozen=True, kw_only=True)
class Merge(Command):
    """Write an adapter into its base's weights, as a new run that needs no adapter, and verify what was written."""

    name: str = setting("", "The LoRA run to merge into its base", metavar="NAME", **A_NAME)
    out: str = setting("", "Name of the new run", required=True, **A_NAME)
    dataset: str = setting("", "The text to verify on; empty takes the adapter's or else the base's", **A_TEXT)
    onto: str = setting(
        "dequantized", "For an adapter trained with QUANTIZE: the values that it was trained on, or the weights that "
        "these were made of", choices=("dequantized", "original"), **ONLY_HERE,
    )  # fmt: skip

    def run(self) -> None:
        check_free(self.root / self.out)
        (adapted,) = open_adapters(self.root, (self.name,))
        text = text_for(adapted, self.dataset)
        windows = held_out(text, adapted.run, adapted.base, Path(self.data_dir), 4)
        how = {}
        if (form := form_of(adapted.base.model)) != "none":
            adapted, how = self.dense(adapted, form, windows), {"trained_on": form, "onto": self.onto}
        run, difference = making.merge_run(adapted, self.root / self.out, windows[0], **how)
        print(f"{run.artifact}: {adapted.base.run.name} with {self.name} merged into it")
        if (off := difference.found) > making.TOLERANCE:
            dtype = str(adapted.base.model.token_embedding.weight.dtype).removeprefix("torch.")
            told = (
                f"{off:.1e} of the largest, which is what rounding the weights to {dtype} costs, as its base has them"
            )
        else:
            told = f"{off:.1e} of the largest (up to {making.TOLERANCE:g} is rounding)"
        print(f"Verified on held-out text of {Path(text).name}: its logits differ from base and adapter by {told}")
        print(f"➡️  Next: {command_line('generate.py', '--run', run.name)}")

    def dense(self, adapted: Adapted, form: str, windows: list[Batch]) -> Adapted:
        """The adapter on the weights that `--onto` names; tells the loss on each that there is.

        Raises UsageError where these are not there."""
        choices, machine = making.dense_bases(adapted), pick_machine(self.device, self.dtype)
        print(f"{self.name} was trained on {adapted.base.run.name} in {form}. Loss on held-out text with the adapter:")
        for name, choice in {form: adapted, **choices}.items():
            print(
                f"   on the weights in {name}: " if name == form else f"   on the {name} weights: ", end="", flush=True
            )
            print(f"{making.loss_with(choice, windows, machine):.4f}", flush=True)
        if self.onto not in choices:
            raise UsageError(f"--onto {self.onto}: {adapted.base.run.artifact} is stored in {form} and has no others")
        return choices[self.onto]


@dataclass(frozen=True, kw_only=True)
class Quantize(Command):
    """Write a base with the matrices of its blocks in 4 or 8 bits, as a new run; a pretrained one so that transformers
    reads it."""

    name: str = setting("", "A run, a Hugging Face folder, or a name on their hub", metavar="BASE", **A_BASE)
    form: str = setting("nf4", "In 4 bits or in 8", choices=("nf4", "int8"), **ONLY_HERE)
    out: str = setting("", "Name of the new run", required=True, **A_NAME)

    def run(self) -> None:
        check_free(self.root / self.out)
        base = Base.of(find_source(self.root, self.name), form=self.form)
        run = making.quantize_run(base, self.root / self.out)
        sizes = [sum(path.stat().st_size for path in made.artifact.glob("*.safetensors")) for made in (base.run, run)]
        print(f"{run.artifact}: {base.run.name} in {self.form}, {size(sizes[1])} instead of {size(sizes[0])}")
        print(f"➡️  Next: {command_line('training.py', '--use-lora', '--base', run.name)}")


@dataclass(frozen=True, kw_only=True)
class Combine(Command):
    """A new adapter that changes the base by the weighted sum of what others change."""

    names: tuple[str, ...] = setting((), "LoRA runs on one base", metavar="NAME", **A_NAME)
    weights: str = setting("", "A number for each; empty gives all the same, 1 together", **NUMBERS)
    method: str = setting(
        "linear", "linear and cat are exact, cat with all ranks stacked; svd cuts to --rank",
        choices=("linear", "cat", "svd"), **ONLY_HERE,
    )  # fmt: skip
    rank: int | None = setting(None, "The rank that svd cuts to", low=1, **ONLY_HERE)
    out: str = setting("", "Name of the new run", required=True, **A_NAME)

    def run(self) -> None:
        weights = numbers(self.weights) if self.weights else [1 / len(self.names)] * len(self.names)
        if len(weights) != len(self.names):
            raise UsageError(
                f"--weights {self.weights}: {len(weights)} for {len(self.names)} adapters; one for each is needed"
            )
        if (self.method == "svd") != (self.rank is not None):
            raise UsageError(
                "--method svd needs --rank" if self.rank is None else f"--method {self.method} takes no --rank"
            )
        check_free(self.root / self.out)
        made = making.combine_runs(
            open_adapters(self.root, self.names), weights, self.method, self.rank, self.root / self.out
        )
        terms = " + ".join(f"{weight:g} x {name}" for weight, name in zip(weights, self.names, strict=True))
        print(f"{self.root / self.out}: {terms}, by {self.method}, rank {report.ranks_in_words(made.adapter)}")
        if self.method == "svd":
            path, worst = max(made.errors.items(), key=lambda item: item[1])
            print(f"Relative error of the change (Frobenius): {made.error:.4f}; most in {path}, {worst:.4f}")
        print(f"➡️  Next: {command_line('generate.py', '--run', self.out)}")


@dataclass(frozen=True, kw_only=True)
class Check(Command):
    """Everything that loading checks, without putting it to use; every problem is named, and the status is 1."""

    path: str = setting("", "A run, an adapter's or a model's folder, or a file", metavar="FILE_OR_FOLDER", **A_PATH)
    base: str = setting("", "The base to compare with; empty takes the one it names", **A_BASE)

    def run(self) -> None:
        path = Path(self.path)
        found = Checkup(self.root, self.base).path(path if path.exists() else self.root / self.path)
        for note in found.notes:
            say(f"Note: {note}")
        for problem in found.problems:
            print(problem)
        if found.problems:
            raise UserError(f"{self.path}: {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}")
        print(f"{self.path}: good ({'; '.join(found.checked)})")


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """An adapter's folder, PEFT's or ours, as a LoRA run on a base that is here."""

    folder: str = setting("", "An adapter's folder, as PEFT writes it", metavar="FOLDER", **A_PATH)
    base: str = setting("", "The run, folder or hub name of the model that it was trained on", required=True, **A_BASE)
    out: str = setting("", "Name of the new run", required=True, **A_NAME)

    def run(self) -> None:
        check_free(self.root / self.out)
        adapter = making.import_folder(Path(self.folder), Base.open(self.root, self.base), self.root / self.out)
        told = f"rank {report.ranks_in_words(adapter)} on {len(adapter.targets())} modules"
        print(f"{self.root / self.out}: {self.folder} as an adapter of {self.base}, {told}")
        print(f"➡️  Next: {command_line('generate.py', '--run', self.out)}")


@dataclass(frozen=True, kw_only=True)
class Remove(Command):
    """Remove runs for good, after naming the adapters that would lose their base."""

    names: tuple[str, ...] = setting((), "Runs", metavar="NAME", **A_NAME)
    yes: bool = setting(False, "Really remove them", **ONLY_HERE)

    def run(self) -> None:
        there = all_runs(self.root)
        for name in self.names:
            if name not in [run.name for run in there]:
                raise UsageError(f"there is no run {name!r} in {self.root}; {suggest(name, there, 'runs')}")
        runs = [run for run in there if run.name in self.names]
        lost = ", ".join(run.name for run in orphaned_by(runs, there))
        told = f"{', '.join(run.name for run in runs)}{f', and leaves without a base: {lost}' if lost else ''}"
        if not self.yes:
            raise UsageError(f"nothing is removed without --yes; it removes {told}")
        remove_runs(runs)
        print(f"Removed {told}")


COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command
    for command in (List, Inspect, Diff, Strength, Merge, Quantize, Combine, Check, Import, Remove)
}


def main() -> None:
    """Run the command."""
    if sys.argv[1:2] == ["export"]:
        instead = command_line("export.py", "NAME", "--to", "peft", "--out", "FOLDER")
        raise UsageError(f"export is a command of its own: {instead}")
    word = subcommand(sys.argv[1:], COMMANDS, __doc__)
    from_command_line(COMMANDS[word], inspect.getdoc(COMMANDS[word]), word).settings.run()


if __name__ == "__main__":
    run_command(main)
