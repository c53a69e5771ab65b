"""What the commands of `dataset.py` do."""

from __future__ import annotations

import difflib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data.instructions.files import SPLITS, files_of
from data.instructions.folio_pairs import folio_pairs_files
from data.instructions.records import Record, parse_columns, to_record
from data.instructions.splits import hold_out
from data.linting.across import MANY
from data.linting.cleaning import CHANGES, Cleaning
from data.linting.forms import converted, others
from data.linting.lint import How, lint, rows_of
from data.linting.reading import Tried
from data.linting.rules import RULES
from jobs.looking import histogram, linted, overview
from jobs.looking.measure import measure_by
from jobs.looking.options import Changed, Clean, Command, Convert, Lint, Look, Split
from jobs.looking.progress import told
from jobs.looking.writing import new_file, new_folder
from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.pictures import save_picture
from runtime.settings.config import RECORD_SETS
from runtime.start import command_line


def files_given(options: Command) -> dict[str, list[Path]]:
    """The files of FILE by their splits."""
    return folio_pairs_files(Path(options.data_dir)) if options.file in RECORD_SETS else files_of(options.file)


def names_of(options: Command) -> dict[str, str]:
    """COLUMNS. Raises UsageError where it names none."""
    try:
        return parse_columns(options.columns)
    except ValueError as error:
        raise UsageError(f"COLUMNS={options.columns}: {error}") from None


def place_of_picture(options: Look) -> Path:
    """Where the picture goes, a free name."""
    if options.out:
        return Path(options.out)
    stem = f"{Path(options.file.split(',')[0].strip()).stem}-lengths".replace(":", "-")  # which Windows forbids
    free = (Path(f"{stem}{f'-{i}' if i > 1 else ''}.png") for i in range(1, 10**6))
    return next(path for path in free if not os.path.lexists(path))


def look(options: Look) -> None:
    """Print what is in the files, and draw the lengths."""
    picture = place_of_picture(options)
    settings, files = options.settings(), files_given(options)
    val_size = 0 if files["validation"] else options.val_size
    found = overview.Overview(measure_by(settings, options.block_size), names_of(options), options.seed, val_size)
    found.add_all(told(rows_of(files)))
    records, context = len(found.lengths), found.measure.context
    number = linted.counted(records, "record")
    print(f"{options.file}: {number}{linted.splits_in_words(found.splits)}; {found.measure.how}")
    if found.bad:
        lint_it = command_line("dataset.py", "lint", options.file)
        say(f"{linted.counted(found.bad_rows, 'row')} left out, the first: {found.bad[0]}; for all: {lint_it}")
    print(f"\n{overview.columns_told(found)}\n\n{overview.lengths_told(found)}\n")
    print(histogram.histogram(found.lengths, context))
    print(f"\n{overview.epoch_told(found, settings)}")
    print(f"\nAs a model is given it, with what it learns after {overview.LEARNED.strip()}:")
    colour = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
    for _, record in sorted(found.sample, key=lambda pair: pair[0]):
        print(f"\n{overview.rendered(record, found.measure, colour)}")
    title, label = f"{options.short_name}: {number}", found.measure.how.partition(" (")[0]
    if save_picture(picture, histogram.draw_lengths, found.lengths, found.learned, context, title, label):
        print(f"\nPicture: {picture}")


def ignored_rules(options: Lint) -> frozenset[str]:
    """The rules of --ignore. Raises UsageError for one that there is not, with the one that was meant."""
    names = list(filter(None, map(str.strip, options.ignore.split(","))))
    for name in names:
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"--ignore {name}: there is no such rule; {meant}There are: {', '.join(RULES)}")
    return frozenset(names)


def lint_files(options: Lint) -> None:
    """Print what breaks the rules. Raises UserError for that where --strict is given."""
    ignored, settings, files = ignored_rules(options), options.settings(), files_given(options)
    measure, names = measure_by(settings, options.block_size), names_of(options)
    how = How(names, options.val_size, measure.tokens, measure.context, options.persona_field, ignored, told)
    report = lint(files, how)
    print(linted.summary(options.file, report, measure.how))
    if (field := options.persona_field) and field not in report.fields:
        say(f"{field} has one value, or more than {MANY}, and no shares to look at")
    if not report.broken:
        return
    print(linted.examples(report))
    if any(RULES[name].mended for name in report.broken):
        print(f"\n➡️  Next: {command_line('dataset.py', 'clean', options.file, '--out', 'clean.jsonl')}")
    if options.strict:
        raise UserError(
            f"{options.file} breaks {linted.counted(len(report.broken), 'rule')}: {', '.join(report.broken)}"
        )


def rows_to_change(options: Changed) -> Tried:
    """The rows of FILE. Raises UsageError where it has several splits, which a file cannot tell apart."""
    files = {split: paths for split, paths in files_given(options).items() if paths}
    if len(files) > 1:
        told_apart = ", ".join(str(path) for paths in files.values() for path in paths)
        raise UsageError(f"{options.file} has files of {' and '.join(files)}; name one at a time: {told_apart}")
    return ((where, row) for _, where, row in told(rows_of(files)))


def records(options: Changed) -> Iterator[Record]:
    """The records of FILE. Raises UserError for the first row that is none, and where there are none."""
    names, where = names_of(options), ""
    for where, row in rows_to_change(options):
        if isinstance(row, UserError):
            raise row
        yield to_record(row, where, names)
    if not where:
        raise UserError(f"{options.file} has no records")


def clean(options: Clean) -> None:
    """Write the rows mended, and print what was changed."""
    cleaning = Cleaning(names_of(options))
    with new_file(Path(options.out)) as file:
        for row in cleaning.rows(rows_to_change(options)):
            file.add(row)
    print(f"{options.file}: {linted.counted(cleaning.read, 'row')}")
    for name, what in CHANGES.items():
        if count := cleaning.changes[name]:
            print(f"  {count:>7,}  {what}")
    if cleaning.refused:
        print(f"           the first of these: {cleaning.refused}")
    print(f"{options.out}: {linted.counted(cleaning.kept, 'record')}")


def side_of(options: Split, record: Record) -> str:
    """The split of a record."""
    if not hold_out([record], options.val_size)[0]:
        return "validation"
    return "train" if hold_out([record], options.val_size + options.test_size)[0] else "test"


def split(options: Split) -> None:
    """Write the records into a file a split."""
    names = [name for name in SPLITS if name != "test" or options.test_size]
    kind = next(path for paths in files_given(options).values() for path in paths).suffix.lower()  # as the first
    counts: Counter[str] = Counter()
    with new_folder(Path(options.out)) as draft, ExitStack() as stack:
        files = {name: stack.enter_context(new_file(draft / f"{name}{kind}")) for name in names}
        for record in records(options):
            side = side_of(options, record)
            counts[side] += 1
            files[side].add(record.row)
        if empty := [name for name in names if not counts[name]]:
            told_of = f"of {linted.counted(counts.total(), 'record')} none is in {empty[0]}"
            raise UserError(f"{options.file}: {told_of}; give it a larger share, or add records")
    for name in names:
        print(f"{Path(options.out) / f'{name}{kind}'}: {linted.counted(counts[name], 'record')}")


def convert(options: Convert) -> None:
    """Write the records in another form."""
    count, names = 0, names_of(options)
    with new_file(Path(options.out)) as file:
        for count, record in enumerate(records(options), 1):  # noqa: B007 - it is printed below
            row = record.row
            file.add(row if options.form == "keep" else converted(record, options.form) | others(row, names))
    print(f"{options.out}: {linted.counted(count, 'record')}{'' if options.form == 'keep' else f', as {options.form}'}")
    if options.form == "text":
        say("Of records that are one text, all is learned: the prompts too")


WORK: dict[type[Command], Callable[[Any], None]] = {
    Look: look,
    Lint: lint_files,
    Clean: clean,
    Split: split,
    Convert: convert,
}


def run(options: Command) -> None:
    """Do what the command is for."""
    WORK[type(options)](options)
