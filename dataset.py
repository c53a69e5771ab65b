"""Look at records of instructions or chats, check them, mend, split and convert them.

python dataset.py look pairs.jsonl                     columns, lengths, three records as a model is given them
python dataset.py lint pairs.jsonl                     what breaks the rules of good data, with the worst examples
python dataset.py lint pairs.jsonl --strict            the same, with status 1 if anything does
python dataset.py clean pairs.jsonl --out clean.jsonl  copies, boilerplate, URLs and white space mended, and counted
python dataset.py split pairs.jsonl --out folder       into folder/train.jsonl, validation.jsonl and test.jsonl
python dataset.py convert pairs.csv --out chats.jsonl --form messages

Files are what DATASET takes: .jsonl, .json, .csv or .parquet, several with commas, a folder, folio-pairs, or the name
of a data set on the Hugging Face hub. No file is changed, and none overwritten. python dataset.py COMMAND --help tells
what each takes.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime.start  # noqa: F401 - before what takes seconds to import
from data.instructions.files import SPLITS, files_of
from data.instructions.folio_pairs import folio_pairs_files
from data.instructions.records import Record, parse_columns, to_record
from data.instructions.splits import hold_out
from data.linting.across import MANY
from data.linting.cleaning import CHANGES, Cleaning
from data.linting.forms import TARGETS, converted, others
from data.linting.lint import How, lint, rows_of
from data.linting.reading import Tried
from data.linting.rules import RULES
from jobs.looking import histogram, linted, overview
from jobs.looking.measure import measure_by
from jobs.looking.progress import told
from jobs.looking.writing import new_file, new_folder
from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.pictures import save_picture, without_pictures
from runtime.processes.command import run_command
from runtime.settings.config import FOLDER, RECORD_SETS, Settings, from_command_line
from runtime.settings.fields import Table, setting
from runtime.settings.flags import subcommand
from runtime.start import command_line

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
    """A command of dataset.py: its arguments, and what it does with them."""

    file: str = setting("", "Files of records", metavar="FILE", **A_PATH | {"allowed": "files, or a folder"})
    columns: str = of_training("columns")
    data_dir: str = of_training("data_dir")

    def files(self) -> dict[str, list[Path]]:
        """The files of FILE by their splits."""
        return folio_pairs_files(Path(self.data_dir)) if self.file in RECORD_SETS else files_of(self.file)

    @property
    def names(self) -> dict[str, str]:
        """COLUMNS. Raises UsageError where it names none."""
        try:
            return parse_columns(self.columns)
        except ValueError as error:
            raise UsageError(f"COLUMNS={self.columns}: {error}") from None

    @property
    def short_name(self) -> str:
        """What FILE is called in what is printed."""
        return Path(self.file.split(",")[0].strip()).name + (" and more" if "," in self.file else "")

    def run(self) -> None:
        """Do it."""
        raise NotImplementedError


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

    def run(self) -> None:
        picture = self.picture()
        settings, files = self.settings(), self.files()
        val_size = 0 if files["validation"] else self.val_size
        found = overview.Overview(measure_by(settings, self.block_size), self.names, self.seed, val_size)
        found.add_all(told(rows_of(files)))
        records, context = len(found.lengths), found.measure.context
        number = linted.counted(records, "record")
        print(f"{self.file}: {number}{linted.splits_in_words(found.splits)}; {found.measure.how}")
        if found.bad:
            lint_it = command_line("dataset.py", "lint", self.file)
            say(f"{linted.counted(found.bad_rows, 'row')} left out, the first: {found.bad[0]}; for all: {lint_it}")
        print(f"\n{overview.columns_told(found)}\n\n{overview.lengths_told(found)}\n")
        print(histogram.histogram(found.lengths, context))
        print(f"\n{overview.epoch_told(found, settings)}")
        print(f"\nAs a model is given it, with what it learns after {overview.LEARNED.strip()}:")
        colour = self.color == "always" or (self.color == "auto" and sys.stdout.isatty())
        for _, record in sorted(found.sample, key=lambda pair: pair[0]):
            print(f"\n{overview.rendered(record, found.measure, colour)}")
        title, label = f"{self.short_name}: {number}", found.measure.how.partition(" (")[0]
        if save_picture(picture, histogram.draw_lengths, found.lengths, found.learned, context, title, label):
            print(f"\nPicture: {picture}")

    def picture(self) -> Path:
        """Where the picture goes, a free name. Raises UsageError where one was asked for that cannot be drawn."""
        if self.out:
            if os.path.lexists(self.out):
                raise UsageError(f"{self.out} is there already, and nothing is overwritten; choose another --out")
            if needed := without_pictures():
                raise UsageError(f"--out {self.out}: {needed}")
            return Path(self.out)
        stem = f"{Path(self.file.split(',')[0].strip()).stem}-lengths".replace(":", "-")  # which Windows forbids
        free = (Path(f"{stem}{f'-{i}' if i > 1 else ''}.png") for i in range(1, 10**6))
        return next(path for path in free if not os.path.lexists(path))


@dataclass(frozen=True, kw_only=True)
class Lint(Measured):
    """What breaks the rules of good data: for each rule how many records, and the worst by file and line."""

    persona_field: str = setting(
        "", "The column whose values should have even shares; empty takes tone, persona, style, category and the like",
        **ONLY_HERE,
    )  # fmt: skip
    ignore: str = setting("", "Rules that do not count, with commas between them", **ONLY_HERE)
    strict: bool = setting(False, "End with status 1 if a rule is broken", **ONLY_HERE)

    def run(self) -> None:
        ignored, settings, files = self.ignored(), self.settings(), self.files()
        measure = measure_by(settings, self.block_size)
        how = How(self.names, self.val_size, measure.tokens, measure.context, self.persona_field, ignored, told)
        report = lint(files, how)
        print(linted.summary(self.file, report, measure.how))
        if (field := self.persona_field) and field not in report.fields:
            say(f"{field} has one value, or more than {MANY}, and no shares to look at")
        if not report.broken:
            return
        print(linted.examples(report))
        if any(RULES[name].mended for name in report.broken):
            print(f"\n➡️  Next: {command_line('dataset.py', 'clean', self.file, '--out', 'clean.jsonl')}")
        if self.strict:
            raise UserError(
                f"{self.file} breaks {linted.counted(len(report.broken), 'rule')}: {', '.join(report.broken)}"
            )

    def ignored(self) -> frozenset[str]:
        """The rules of --ignore. Raises UsageError for one that there is not, with the one that was meant."""
        names = list(filter(None, map(str.strip, self.ignore.split(","))))
        for name in names:
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, n=1)
                meant = f"did you mean {near[0]}? " if near else ""
                raise UsageError(f"--ignore {name}: there is no such rule; {meant}There are: {', '.join(RULES)}")
        return frozenset(names)


@dataclass(frozen=True, kw_only=True)
class Changed(Command):
    """A command that writes records of one split as a new file."""

    out: str = setting("", "The new file; its ending says which kind", required=True, **A_PATH)

    def rows(self) -> Tried:
        """The rows of FILE. Raises UsageError where it has several splits, which a file cannot tell apart."""
        files = {split: paths for split, paths in self.files().items() if paths}
        if len(files) > 1:
            told_apart = ", ".join(str(path) for paths in files.values() for path in paths)
            raise UsageError(f"{self.file} has files of {' and '.join(files)}; name one at a time: {told_apart}")
        return ((where, row) for _, where, row in told(rows_of(files)))

    def records(self) -> Iterator[Record]:
        """The records of FILE. Raises UserError for the first row that is none, and where there are none."""
        names, where = self.names, ""
        for where, row in self.rows():
            if isinstance(row, UserError):
                raise row
            yield to_record(row, where, names)
        if not where:
            raise UserError(f"{self.file} has no records")


@dataclass(frozen=True, kw_only=True)
class Clean(Changed):
    """Mend what needs no person: white space, boilerplate and URLs in answers, exact copies. Each change is counted."""

    def run(self) -> None:
        cleaning = Cleaning(self.names)
        with new_file(Path(self.out)) as file:
            for row in cleaning.rows(self.rows()):
                file.add(row)
        print(f"{self.file}: {linted.counted(cleaning.read, 'row')}")
        for name, what in CHANGES.items():
            if count := cleaning.changes[name]:
                print(f"  {count:>7,}  {what}")
        if cleaning.refused:
            print(f"           the first of these: {cleaning.refused}")
        print(f"{self.out}: {linted.counted(cleaning.kept, 'record')}")


@dataclass(frozen=True, kw_only=True)
class Split(Changed):
    """Write train, validation and test files. A record's prompt decides where it goes: it stays there when others are
    added, records with one prompt stay together, and the validation file is what training would hold out."""

    val_size: float = of_training("val_size")
    test_size: float = setting(0.1, "Share of the records for the test file; 0 writes none", **A_SHARE)
    out: str = setting("", "The new folder", required=True, **A_PATH)

    def run(self) -> None:
        if self.val_size + self.test_size >= 1:
            raise UsageError(f"VAL_SIZE={self.val_size:g} and --test-size {self.test_size:g} leave nothing to train on")
        names = [name for name in SPLITS if name != "test" or self.test_size]
        kind = self.suffix
        counts: Counter[str] = Counter()
        with new_folder(Path(self.out)) as draft, ExitStack() as stack:
            files = {name: stack.enter_context(new_file(draft / f"{name}{kind}")) for name in names}
            for record in self.records():
                side = self.side(record)
                counts[side] += 1
                files[side].add(record.row)
            if empty := [name for name in names if not counts[name]]:
                told_of = f"of {linted.counted(counts.total(), 'record')} none is in {empty[0]}"
                raise UserError(f"{self.file}: {told_of}; give it a larger share, or add records")
        for name in names:
            print(f"{Path(self.out) / f'{name}{kind}'}: {linted.counted(counts[name], 'record')}")

    @property
    def suffix(self) -> str:
        """The kind of the first file, which the new ones are of too."""
        return next(path for paths in self.files().values() for path in paths).suffix.lower()

    def side(self, record: Record) -> str:
        """The split of a record."""
        if not hold_out([record], self.val_size)[0]:
            return "validation"
        return "train" if hold_out([record], self.val_size + self.test_size)[0] else "test"


@dataclass(frozen=True, kw_only=True)
class Convert(Changed):
    """Write records in another form or another kind of file. Columns that are no part of the record stay."""

    form: str = setting("keep", "The new form; keep leaves each row as it is", choices=("keep", *TARGETS), **ONLY_HERE)

    def run(self) -> None:
        count = 0
        with new_file(Path(self.out)) as file:
            for count, record in enumerate(self.records(), 1):  # noqa: B007 - it is printed below
                row = record.row
                file.add(row if self.form == "keep" else converted(record, self.form) | others(row, self.names))
        print(f"{self.out}: {linted.counted(count, 'record')}{'' if self.form == 'keep' else f', as {self.form}'}")
        if self.form == "text":
            say("Of records that are one text, all is learned: the prompts too")


COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command for command in (Look, Lint, Clean, Split, Convert)
}


def main() -> None:
    """Run the command."""
    word = subcommand(sys.argv[1:], COMMANDS, __doc__)
    from_command_line(COMMANDS[word], inspect.getdoc(COMMANDS[word]), word).settings.run()


if __name__ == "__main__":
    run_command(main)
