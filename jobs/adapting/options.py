"""The commands of `adapters.py`: what each takes, and what of it goes together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UsageError
from runtime.pictures import check_picture
from runtime.settings.config import FOLDER, NAME, NAMED, CommonSettings
from runtime.settings.fields import setting
from runtime.storage import folders

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


@dataclass(frozen=True, kw_only=True)
class Command(CommonSettings):
    """A command of adapters.py: its arguments."""

    @property
    def root(self) -> Path:
        """The folder of the runs."""
        return Path(self.checkpoints_dir)

    def check(self) -> None:
        """Raises UsageError for what cannot be, before anything is read."""


@dataclass(frozen=True, kw_only=True)
class Making(Command):
    """A command that makes a run."""

    out: str = setting("", "Name of the new run", required=True, **A_NAME)

    @property
    def place(self) -> Path:
        """Its folder."""
        return self.root / self.out

    def check(self) -> None:
        """Raises UsageError where something has the name already."""
        folders.check_free(self.place)


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """Every run, below its base: variant and rank, targets, text, tokenizer, steps, losses, when it finished.

    loss: nats per token of held-out text; bits: per character of it, which compares across tokenizers.
    """


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """How much an adapter changes each module, as a table and a picture."""

    name: str = setting("", "The LoRA run to look into", metavar="NAME", **A_NAME)
    out: str = setting("", "File for the picture; empty puts it into the run's folder", **A_PATH)

    def check(self) -> None:
        """Raises UsageError where a picture was asked for that could not be drawn, or not be written there."""
        check_picture(self.out)


@dataclass(frozen=True, kw_only=True)
class Diff(Command):
    """The cosine between two adapters' changes, module by module: 1 the same direction, 0 unrelated, -1 opposite."""

    one: str = setting("", "A LoRA run", metavar="A", **A_NAME)
    other: str = setting("", "Another on the same base", metavar="B", **A_NAME)


@dataclass(frozen=True, kw_only=True)
class Strength(Inspect):
    """The forgetting meter: held-out loss on the adapter's text and on the base's, at several strengths."""

    strengths: str = setting("0,0.25,0.5,0.75,1", "Strengths to measure at", **NUMBERS)
    dataset: str = setting("", "The adapter's text; empty takes the one it was trained on", **A_TEXT)
    eval_iters: int = setting(40, "Batches of held-out text", low=1, **ONLY_HERE)


@dataclass(frozen=True, kw_only=True)
class Merge(Making):
    """Write an adapter into its base's weights, as a new run that needs no adapter, and verify what was written."""

    name: str = setting("", "The LoRA run to merge into its base", metavar="NAME", **A_NAME)
    dataset: str = setting("", "The text to verify on; empty takes the adapter's or else the base's", **A_TEXT)
    onto: str = setting(
        "dequantized", "For an adapter trained with QUANTIZE: the values that it was trained on, or the weights that "
        "these were made of", choices=("dequantized", "original"), **ONLY_HERE,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Quantize(Making):
    """Write a base with the matrices of its blocks in 4 or 8 bits, as a new run; a pretrained one so that transformers
    reads it."""

    name: str = setting("", "A run, a Hugging Face folder, or a name on their hub", metavar="BASE", **A_BASE)
    form: str = setting("nf4", "In 4 bits or in 8", choices=("nf4", "int8"), **ONLY_HERE)


@dataclass(frozen=True, kw_only=True)
class Combine(Making):
    """A new adapter that changes the base by the weighted sum of what others change."""

    names: tuple[str, ...] = setting((), "LoRA runs on one base", metavar="NAME", **A_NAME)
    weights: str = setting("", "A number for each; empty gives all the same, 1 together", **NUMBERS)
    method: str = setting(
        "linear", "linear and cat are exact, cat with all ranks stacked; svd cuts to --rank",
        choices=("linear", "cat", "svd"), **ONLY_HERE,
    )  # fmt: skip
    rank: int | None = setting(None, "The rank that svd cuts to", low=1, **ONLY_HERE)

    def check(self) -> None:
        """Raises UsageError for weights that are not one for each, and for a rank that is missing or has no meaning."""
        if self.weights and (given := len(numbers(self.weights))) != len(self.names):
            told = f"{given} for {len(self.names)} adapters; one for each is needed"
            raise UsageError(f"--weights {self.weights}: {told}")
        if self.method == "svd" and self.rank is None:
            raise UsageError("--method svd needs --rank")
        if self.method != "svd" and self.rank is not None:
            raise UsageError(f"--method {self.method} takes no --rank")
        super().check()


@dataclass(frozen=True, kw_only=True)
class Check(Command):
    """Everything that loading checks, without putting it to use; every problem is named, and the status is 1."""

    path: str = setting("", "A run, an adapter's or a model's folder, or a file", metavar="FILE_OR_FOLDER", **A_PATH)
    base: str = setting("", "The base to compare with; empty takes the one it names", **A_BASE)

    @property
    def place(self) -> Path:
        """The path from here, else in the folder of the runs."""
        path = Path(self.path)
        return path if folders.is_there(path) else self.root / path

    def check(self) -> None:
        """Raises UsageError where there is nothing to check."""
        if not folders.is_there(self.place):
            raise UsageError(f"{self.path}: there is no such file, and no such run in {self.root}")


@dataclass(frozen=True, kw_only=True)
class Import(Making):
    """An adapter's folder, PEFT's or ours, as a LoRA run on a base that is here."""

    folder: str = setting("", "An adapter's folder, as PEFT writes it", metavar="FOLDER", **A_PATH)
    base: str = setting("", "The run, folder or hub name of the model that it was trained on", required=True, **A_BASE)

    def check(self) -> None:
        """Raises UsageError where the folder is not there, or something has the new run's name already."""
        folders.check_there(Path(self.folder))
        super().check()


@dataclass(frozen=True, kw_only=True)
class Remove(Command):
    """Remove runs for good, after naming the adapters that would lose their base."""

    names: tuple[str, ...] = setting((), "Runs", metavar="NAME", **A_NAME)
    yes: bool = setting(False, "Really remove them", **ONLY_HERE)


COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command
    for command in (List, Inspect, Diff, Strength, Merge, Quantize, Combine, Check, Import, Remove)
}
