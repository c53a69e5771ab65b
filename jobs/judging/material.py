"""What a run is judged on: the prompts with the answers that are wanted, what it learned from, and its base's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.corpora import CORPORA, load_corpus
from data.instructions.encoding import Encoded, encode_record
from data.instructions.files import files_of
from data.instructions.records import Record, parse_columns
from data.instructions.splits import Records, read_records
from data.instructions.tuning import InstructionData, Sizes
from data.text import tokens_of
from jobs.adapting.adapted import load_text
from jobs.judging.losses import encode_windows
from jobs.judging.sides import Opened
from jobs.runs.source import load_source, read_source_records
from runtime.errors import UsageError, UserError
from runtime.settings.config import EARLIER, RECORD_SETS, Settings, has_records
from runtime.storage.runs import Run

WINDOW = 1024  # tokens of a window of the base's text, where the base takes more
LEARNED = 100  # training records whose loss is measured, at most
WINDOW_TOKENS = 2**14  # of the base's text that are measured on


@dataclass(frozen=True)
class Asked:
    """Records, chosen evenly, and each as tokens with the answer that is wanted. of: how many there were to choose
    from. what: which these are, in words."""

    records: Sequence[Record]
    encoded: Sequence[Encoded]
    of: int
    what: str

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Learned:
    """What a run was trained on: all its records, and some of them as tokens, chosen evenly."""

    records: Sequence[Record]
    encoded: Sequence[Encoded]


@dataclass(frozen=True)
class Material:
    """Prompts, what was learned, windows of the base's own text, and what a reader of the report must know of these."""

    asked: Asked
    learned: Learned | None
    base_text: tuple[str, list[Encoded]] | None
    notes: list[str]


@dataclass(frozen=True)
class Wish:
    """What was asked for. data: where the prompts are, or empty for the run's own. columns: None for the run's own.
    limit: prompts at most, 0 for all. base_text: a text, or empty for the base's own."""

    data: str
    columns: str | None
    limit: int
    base_text: str
    data_dir: Path


def evenly(count: int, limit: int) -> list[int]:
    """Which of so many to take, at most `limit` of them, or all where that is 0."""
    kept = min(count, limit) if limit else count
    return [i * count // kept for i in range(kept)]


def gather(opened: Opened, wish: Wish) -> Material:
    """All that a run is judged on.

    Raises UsageError where it is not known what to ask, UserError for records that cannot be read or encoded, and for a
    text that cannot be read.
    """
    notes: list[str] = []
    learned, own = _own_records(opened, wish, notes)
    if wish.data:
        asked = _given_records(opened, wish)
    elif own:
        asked = _held_out(opened, own, wish, notes)
    else:
        raise UsageError(f"{opened.run.name} was not trained on records; say with --data FILE what to ask it")
    if learned:
        known = {record.asked for record in learned.records}
        if seen := sum(record.asked in known for record in asked.records):
            notes.append(
                f"{seen} of the {len(asked)} prompts are among those that the run was trained on: its answers to them "
                "show what it remembers."
            )
    return Material(asked, learned, _base_text(opened, wish, notes), notes)


def run_settings(run: Run, data_dir: Path) -> Settings | None:
    """The settings of a run that was trained on records; None for one that was not."""
    settings = run.metadata["settings"]
    if not settings.get("dataset") or not has_records(settings["dataset"]):
        return None
    return replace(Settings.from_dict(EARLIER | settings), data_dir=str(data_dir))


def _own_records(opened: Opened, wish: Wish, notes: list[str]) -> tuple[Learned | None, InstructionData | None]:
    """What a run was trained on, and that as data; nothing where it was trained on no records. Where they cannot be
    read any more that is noted, or an error where the prompts are to come from them."""
    settings = run_settings(opened.run, wish.data_dir)
    if settings is None:
        notes.append(f"Copying and overfitting are not measured, as {opened.run.name} was not trained on records.")
        return None, None
    try:
        records = load_source(settings)
    except UserError as error:
        where = f"{error}; {opened.run.name} was trained on it"
        if not wish.data:
            raise UserError(f"{where}: go to the folder where that was, or say with --data FILE what to ask") from None
        notes.append(f"Copying and overfitting are not measured: {where}.")
        return None, None
    skips = settings.long_records == "skip"
    sizes = Sizes(opened.window, 1, 1, 0, all_count=settings.train_on_prompt, skip_long=skips)
    data = InstructionData.load(records, opened.template, opened.tokenizer, wish.data_dir, sizes)
    if data.sha256 != opened.run.metadata.get("dataset", {}).get("sha256", data.sha256):
        notes.append(
            f"{settings.dataset} is not what it was when the run was trained: what is held out now it may have learned."
        )
    chosen = evenly(len(data.train), LEARNED)
    return Learned(data.records.train, [data.train[i] for i in chosen]), data


def _held_out(opened: Opened, own: InstructionData, wish: Wish, notes: list[str]) -> Asked:
    """The test records of a run's data where there are some, else its validation records."""
    if own.records.test:
        return _asked(opened, own.records.test, wish, f"test records of {own.name}")
    notes.append(
        "There are no test records, so these are the validation records, by which the run chose its weights: it looks "
        "slightly better on them than on others."
    )
    return _asked(opened, own.records.validation, wish, f"validation records of {own.name}")


def _given_records(opened: Opened, wish: Wish) -> Asked:
    """All records that --data names."""
    columns = wish.columns if wish.columns is not None else opened.run.metadata["settings"].get("columns", "")
    try:
        records = all_records(wish.data, columns, wish.data_dir)
    except ValueError as error:
        raise UsageError(f"--columns {columns}: {error}") from None
    return _asked(opened, records, wish, f"records of {wish.data}")


def all_records(dataset: str, columns: str, data_dir: Path) -> list[Record]:
    """Every record of what DATASET may name, of all its splits. Raises ValueError for columns that are none, UsageError
    for what has no records."""
    if dataset in RECORD_SETS:
        found: Records = read_source_records(dataset, columns, Settings().val_size, data_dir)
        return [*found.train, *found.validation, *found.test]
    if not has_records(dataset):
        raise UsageError(f"--data {dataset}: give a file of records (.jsonl, .json, .csv, .parquet) or their folder")
    named = parse_columns(columns)
    return [record for paths in files_of(dataset).values() for record in read_records(paths, named)]


def _asked(opened: Opened, records: Sequence[Record], wish: Wish, what: str) -> Asked:
    """Some of the records that ask something. Raises UserError where none does, and for one that cannot be encoded."""
    asking = [record for record in records if record.asked]
    if not asking:
        raise UserError(f"{what}: none of them has a prompt, so there is nothing to ask")
    chosen = [asking[i] for i in evenly(len(asking), wish.limit)]
    encoded = [encode_record(record, opened.template, opened.tokenizer).cut(opened.window + 1) for record in chosen]
    return Asked(chosen, encoded, len(asking), what)


def _base_text(opened: Opened, wish: Wish, notes: list[str]) -> tuple[str, list[Encoded]] | None:
    """Windows of the text that forgetting is measured on: the one given, or else the base's own; None where there is no
    base, or its text is not known or cannot be read, which is noted. Raises UserError for a given one that is none."""
    if not opened.base:
        return None
    if wish.base_text:
        return _given_text(opened, wish.base_text, wish.data_dir)
    own = opened.base.metadata["settings"].get("dataset", "")
    if own and not has_records(own):
        try:
            text = load_text(own, opened.base, wish.data_dir).validation
            return f"held-out text of {own}", _windows(opened, text, wish.data_dir)
        except UserError as error:
            why = f"the text of the base cannot be read ({error})"
    else:
        why = f"{opened.base.name} was trained on {'records' if own else 'nobody knows what text'}"
    notes.append(f"Forgetting is not measured: {why}. With --base-text FILE it is measured on a text of yours.")
    return None


def _given_text(opened: Opened, name: str, data_dir: Path) -> tuple[str, list[Encoded]]:
    """What is held out of a corpus, or the whole text of a file."""
    corpus = load_corpus(name, data_dir)
    what, text = (f"held-out text of {name}", corpus.validation) if name in CORPORA else (name, corpus.text)
    try:
        return what, _windows(opened, text, data_dir)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _windows(opened: Opened, text: str, data_dir: Path) -> list[Encoded]:
    tokens, length = tokens_of(text, opened.tokenizer, data_dir), min(opened.tokens, WINDOW)
    if len(tokens) < 2:
        raise UserError("it has less than two tokens, and nothing can be measured on it")
    return encode_windows(tokens, length, max(1, WINDOW_TOKENS // length))
