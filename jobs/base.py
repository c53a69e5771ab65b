"""The base that a run starts from: which one it is, whether it may serve, whether the settings fit it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from data.tokenizers import Tokenizer
from models.bigram_lm_v2_lora import ModelShape
from runtime.checkpoint import Run, all_runs, find_run
from runtime.config import SHAPE, Settings
from runtime.console import say
from runtime.errors import UsageError
from runtime.sources import Resolved


def find_base(settings: Settings, given: Collection[str] = ()) -> Run | None:
    """The run that BASE names, else the newest finished base on the default text, else the newest, else None.

    given: the settings of shape that were given, which it should have. A choice among several is told on stderr.
    TEST_MODE runs look for a TEST_MODE base, others never take one. Raises UsageError where BASE may not serve.
    """
    root = Path(settings.checkpoints_dir)
    if settings.base:
        run = find_run(root, settings.base)
        check_base(run, settings)
        return run
    bases = [run for run in all_runs(root) if run.kind == "base" and run.finished and not run.aside]
    bases = [run for run in bases if run.about["settings"]["test_mode"] == settings.test_mode]
    wanted = {name: getattr(settings, name) for name in given}
    fitting = [run for run in bases if wanted.items() <= run.about["settings"].items()] or bases
    text = Settings().dataset
    chosen = ([run for run in fitting if run.about["settings"]["dataset"] == text] or fitting or [None])[-1]
    if len(bases) > 1:
        trained_on = chosen.about["settings"]["dataset"]
        others = ", ".join(run.name for run in bases[::-1] if run is not chosen)
        say(f"Base: {chosen.name}, the newest one here trained on {trained_on}; for another, --base with: {others}")
    return chosen


def base_settings(given: Resolved) -> Resolved:
    """The settings for training a base before a LoRA run: its shape and the machine as given, the rest as usual."""
    carried = (*SHAPE, "seed", "device", "dtype", "checkpoints_dir", "data_dir", "test_mode")
    values = {name: getattr(given.settings, name) for name in carried if given.explicit(name)}
    return Resolved(Settings.from_dict(values), {name.upper(): given.sources[name.upper()] for name in values})


def check_base(run: Run, settings: Settings) -> None:
    """Raises UsageError where the run that BASE names may not serve as a base."""
    if run.kind == "lora":
        raise UsageError(
            f"BASE={settings.base} is a LoRA run; name the base it was trained on: {run.about['base']['run']}"
        )
    if not run.finished:
        raise UsageError(f"BASE={settings.base} has not finished training; start it again to go on with it")
    if run.about["settings"]["test_mode"] and not settings.test_mode:
        raise UsageError(f"BASE={settings.base} is a TEST_MODE run, which serves as a base in TEST_MODE only")


def check_shape(given: Resolved, shape: ModelShape, tokenizer: Tokenizer, base: Run) -> None:
    """Refuse settings of shape that contradict the base. Raises UsageError naming each."""
    has = asdict(shape) | {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    wrong = [name for name in SHAPE if given.explicit(name) and getattr(given.settings, name) != has[name]]
    if wrong:
        said = ", ".join(f"{name.upper()}={getattr(given.settings, name)} (it has {has[name]})" for name in wrong)
        raise UsageError(f"the base {base.name} has another shape: {said}; leave these out, or choose another BASE")
