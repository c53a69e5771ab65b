"""The commands of `dataset.py`: what each takes, and what of it goes together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.looking.writing import kind_of
from runtime.errors import UsageError
from runtime.pictures import check_picture
from runtime.settings.config import FOLDER, Settings
from runtime.settings.fields import Table, setting
from runtime.storage import folders

WHAT = "What to do"
ONLY_HERE = {"group": WHAT, "env": False}
A_PATH = {"pattern": FOLDER, "path": True, "allowed": "a path", **ONLY_HERE}
A_SHARE = {"low": 0, "high": 1, "high_open": True, **ONLY_HERE}


def of_training(name: str, help: str = "", **changed: Any) -> Any:
    """A setting of training.py, which means the same here; from the environment and .env too."""
    row = Settings.__dataclass_fields__[name]
    metadata = {**row.metadata, "group": "As in training"} | ({"help": help} if help else {})
    return dataclasses.field(**{"default": row.default, "metadata": metadata} | changed)


@dataclass(frozen=True, kw_only=True)
class Command(Table):
    """A command of dataset.py: its arguments."""

    file: str = setting("", "Files of records", metavar="FILE", **A_PATH | {"allowed": "files, or a folder"})
    columns: str = of_training("columns")
    data_dir: str = of_training("data_dir")

    @property
    def short_name(self) -> str:
        """What FILE is called in what is printed."""
        return Path(self.file.split(",")[0].strip()).name + (" and more" if "," in self.file else "")

    def check(self) -> None:
        """Raises UsageError for what cannot be, before anything is read."""


@dataclass(frozen=True, kw_only=True)
class Measured(Command):
    """A command that counts tokens."""

    base: str = of_training(
        "base",
        "The model that will be trained, whose tokenizer counts and whose template writes: a run, by name or folder, a "
        "Hugging Face folder, or a name on their hub; if empty, a token is estimated as 4 characters",
    )
    template: str = of_training("template")
    block_size: int | None = of_training(
        "block_size", "Context length in tokens; none is what training takes on BASE, or 1024 without one", default=None
    )
    val_size: float = of_training("val_size")
    checkpoints_dir: str = of_training("checkpoints_dir")

    def settings(self) -> Settings:
        """Those of a training run on these records, as far as they are given here."""
        names = {field.name for field in dataclasses.fields(self)} & {
            field.name for field in dataclasses.fields(Settings)
        }
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Settings.from_dict(given | {"dataset": self.file})


@dataclass(frozen=True, kw_only=True)
class Look(Measured):
    """What is in files of records: columns, lengths in tokens, three records with what is learned marked, and how many
    steps an epoch has. The lengths are drawn too."""

    batch_size: int | None = of_training(
        "batch_size", "Sequences per batch; auto is what training takes where it is not given", default=None
    )
    gradient_accumulation_steps: int | None = of_training(
        "gradient_accumulation_steps", "Batches per training step; none is what training takes", default=None
    )
    seed: int = of_training("seed", "Which records are shown")
    out: str = setting("", "File for the picture; empty takes a new name here", **A_PATH | {"pattern": f"|{FOLDER}"})
    color: str = setting(
        "auto", "Colours; auto has them on a terminal", choices=("auto", "always", "never"), **ONLY_HERE
    )

    def check(self) -> None:
        """Raises UsageError where a picture was asked for that could not be drawn, or not be written there."""
        check_picture(self.out)


@dataclass(frozen=True, kw_only=True)
class Lint(Measured):
    """What breaks the rules of good data: for each rule how many records, and the worst by file and line."""

    persona_field: str = setting(
        "", "The column whose values should have even shares; empty takes tone, persona, style, category and the like",
        **ONLY_HERE,
    )  # fmt: skip
    ignore: str = setting("", "Rules that do not count, with commas between them", **ONLY_HERE)
    strict: bool = setting(False, "End with status 1 if a rule is broken", **ONLY_HERE)


@dataclass(frozen=True, kw_only=True)
class Changed(Command):
    """A command that writes records of one split as a new file."""

    out: str = setting("", "The new file; its ending says which kind", required=True, **A_PATH)

    def check(self) -> None:
        """Raises UsageError where something has the name already, and where no kind of file ends so."""
        folders.check_free(Path(self.out))
        kind_of(Path(self.out))


@dataclass(frozen=True, kw_only=True)
class Clean(Changed):
    """Mend what needs no person: white space, boilerplate and URLs in answers, exact copies. Each change is counted."""


@dataclass(frozen=True, kw_only=True)
class Split(Changed):
    """Write train, validation and test files. A record's prompt decides where it goes: it stays there when others are
    added, records with one prompt stay together, and the validation file is what training would hold out."""

    val_size: float = of_training("val_size")
    test_size: float = setting(0.1, "Share of the records for the test file; 0 writes none", **A_SHARE)
    out: str = setting("", "The new folder", required=True, **A_PATH)

    def check(self) -> None:
        """Raises UsageError where something has the name already, and for shares that leave nothing."""
        folders.check_free(Path(self.out))
        if self.val_size + self.test_size >= 1:
            raise UsageError(f"VAL_SIZE={self.val_size:g} and --test-size {self.test_size:g} leave nothing to train on")


@dataclass(frozen=True, kw_only=True)
class Convert(Changed):
    """Write records in another form or another kind of file. Columns that are no part of the record stay."""

    form: str = setting(
        "keep", "The new form; keep leaves each row as it is",
        choices=("keep", "instruction", "completion", "messages", "sharegpt", "text"), **ONLY_HERE,
    )  # fmt: skip


COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command for command in (Look, Lint, Clean, Split, Convert)
}
