"""Adapters by name: a LoRA run opened with its base, and new runs made out of old ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.chat import Template
from data.corpora import Corpus, load_corpus
from data.instructions.tuning import InstructionData, Sizes
from data.text import tokens_of, validation_windows
from jobs.runs.base import Base, base_of, reference
from jobs.runs.job import IN_CONFIG, run_metadata
from jobs.runs.source import TEST_CHARACTERS, load_source, template_for
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from models.files import form_of
from models.pretrained.families import family_with
from runtime.errors import UsageError, UserError, join_problems
from runtime.settings.config import EARLIER, Settings, has_records
from runtime.storage import folders
from runtime.storage.encoding import to_sealed_json
from runtime.storage.runs import ARTIFACTS, Run, all_runs, open_run, suggest
from runtime.training.batch import Batch

LONGEST = 1024  # tokens in a window of text that is measured on, where the base would take more


@dataclass(frozen=True)
class Adapted:
    """A LoRA run with its adapter and its base."""

    run: Run
    adapter: Adapter
    base: Base


def base_name(run: Run) -> str:
    """The base that a LoRA run names."""
    return run.metadata["base"]["run"]


def find_adapter(root: Path, name: str) -> Run:
    """The LoRA run of that name. Raises UsageError with those there are."""
    run = open_run(root / name)
    if run is None or run.kind != "lora":
        known = suggest(name, [run for run in all_runs(root) if run.kind == "lora"], "adapters")
        what = f"{name} is no LoRA run" if run else f"there is no adapter {name!r} in {root}"
        raise UsageError(f"{what}; {known}")
    return run


def read_adapter(run: Run) -> Adapter:
    """A LoRA run's adapter, its files verified."""
    return adapter_files.from_files(run.read(), str(run.artifact if run.finished else run.folder), family_with)


def open_adapters(root: Path, names: tuple[str, ...]) -> list[Adapted]:
    """LoRA runs with their adapters, all on one base.

    Raises UsageError for a name that is none, UserError that tells everything that does not fit.
    """
    runs = [find_adapter(root, name) for name in names]
    if len(bases := {run.metadata["base"].get("sha256", base_name(run)) for run in runs}) > 1:
        told = ", ".join(f"{run.name} of {base_name(run)}" for run in runs)
        raise UserError(f"adapters of {len(bases)} bases do not go together: {told}")
    adapters, base = [read_adapter(run) for run in runs], base_of(root, runs[0])
    problems = [
        f"{run.name}: {problem}"
        for run, adapter in zip(runs, adapters, strict=True)
        for problem in base.problems(adapter)
    ]
    if problems:
        raise UserError(f"no adapter for {base.run.name}: {join_problems(problems)}")
    return [Adapted(run, adapter, base) for run, adapter in zip(runs, adapters, strict=True)]


# --- texts --------------------------------------------------------------------------------------------------------


def texts_of(run: Run) -> list[str]:
    """The DATASET settings of the texts that a run was trained on; none where that is not known."""
    texts = run.metadata.get("texts", [run.metadata["settings"].get("dataset")])
    return [text for text in texts if text]


def load_text(name: str, run: Run, data_dir: Path) -> Corpus:
    """A text as a run saw it: cut short where that was a TEST_MODE run."""
    corpus = load_corpus(name, data_dir)
    return corpus.head(*TEST_CHARACTERS) if run.metadata["settings"].get("test_mode") else corpus


def held_out(name: str, run: Run, base: Base, data_dir: Path, batches: int) -> list[Batch]:
    """At most so many batches of 16 windows of a text's held-out part, fewer windows a batch where they are long; of
    records, 16 of those that are held out, written as the run had them. run: the one that was trained on it."""
    if has_records(name):
        return _held_out_records(name, run, base, data_dir, batches)
    tokens = tokens_of(load_text(name, base.run, data_dir).validation, base.tokenizer, data_dir)
    if len(tokens) < 2:
        raise UserError(f"the held-out part of {name} has {len(tokens)} tokens, and nothing can be measured on it")
    length = min(base.model.config.max_positions, LONGEST, len(tokens) - 1)
    return validation_windows(tokens, length, 16 if length <= 256 else max(1, 2048 // length), batches)


def _held_out_records(name: str, run: Run, base: Base, data_dir: Path, batches: int) -> list[Batch]:
    told = {"dataset": name, "data_dir": str(data_dir), "template": ""}
    settings = Settings.from_dict(EARLIER | run.metadata["settings"] | told)
    source = run.metadata.get("template")
    template = Template.of(source, base.tokenizer) if source else template_for(settings, base.tokenizer)
    length = min(base.model.config.max_positions, LONGEST)
    sizes = Sizes(length, 16 if length <= 256 else max(1, 2048 // length), 1, settings.seed)
    return InstructionData.load(load_source(settings), template, base.tokenizer, data_dir, sizes).validation(batches)


# --- new runs -----------------------------------------------------------------------------------------------------


def metadata_of_made(root: Path, kind: str, base: Base, adapter: Adapter | None, texts: list[str], made: dict) -> dict:
    """What `run.json` says of a run that was made, not trained. made: what it was made of, and how.

    Of settings it has what the adapter is, and none of those that its base was trained with.
    """
    test_mode = base.run.metadata["settings"]["test_mode"]
    settings = {"use_lora": kind == "lora", "test_mode": test_mode, "base": base.run.name}
    settings["dataset"] = texts[0] if texts else ""
    if kind == "lora":
        settings |= {f"lora_{name}": getattr(adapter.config, name) for name in IN_CONFIG}
        settings["quantize"] = form_of(base.model)
    named = reference(base, root)
    return run_metadata(kind, settings, base.model.config, named, base.tokenizer, texts=texts, made=made)


def shared_template(runs: Sequence[Run]) -> dict[str, str]:
    """What `run.json` says of the template that all of these runs were trained with; nothing where they differ."""
    told = {run.metadata.get("template") for run in runs}
    (source,) = told if len(told) == 1 else (None,)
    return {"template": source} if source else {}


def publish(
    folder: Path, about: dict, files: folders.Files, result: dict, verify: Callable[[Run], None] = lambda run: None
) -> Run:
    """A finished run, whole or not at all. `verify` gets the written run before it has its name, and may raise."""
    folders.check_free(folder)
    draft = Run(folder.with_name(f".tmp-{folder.name}-{os.getpid()}"), about)
    try:
        folders.commit_folder(draft.folder / ARTIFACTS[about["kind"]], files)
        folders.write_file(draft.folder / "result.json", to_sealed_json(result))
        verify(draft)
        folders.write_file(draft.folder / "run.json", to_sealed_json(about))
        folders.publish_folder(draft.folder, folder)
    except BaseException:
        folders.remove_folder(draft.folder)
        raise
    return Run(folder, about)
