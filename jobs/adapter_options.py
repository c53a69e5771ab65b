"""The arguments of each command of adapters.py."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.config import FOLDER, NAME, NAMED, Machine
from runtime.fields import setting

WHAT = "What to do"
NUMBER = r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,2})?"
ONLY_HERE = {"group": WHAT, "env": False}
NUMBERS = {"pattern": rf"|{NUMBER}( *, *{NUMBER})*", "allowed": "numbers with commas between them", **ONLY_HERE}
A_NAME = {"pattern": rf"|{NAME}", "allowed": f"a run's name, not a path: {NAMED}", **ONLY_HERE}
A_PATH = {"pattern": rf"|{FOLDER}", "allowed": "a path", **ONLY_HERE}
A_TEXT = {"pattern": rf"|{FOLDER}", "allowed": "the name of a corpus or a path", **ONLY_HERE}


@dataclass(frozen=True, kw_only=True)
class List(Machine):
    """`list` takes only what every command takes."""


@dataclass(frozen=True, kw_only=True)
class Inspect(Machine):
    """The arguments of `inspect`."""

    name: str = setting("", "The LoRA run to look into", place="NAME", **A_NAME)
    out: str = setting("", "File for the picture; empty puts it into the run's folder", **A_PATH)


@dataclass(frozen=True, kw_only=True)
class Diff(Machine):
    """The arguments of `diff`."""

    one: str = setting("", "A LoRA run", place="A", **A_NAME)
    other: str = setting("", "Another on the same base", place="B", **A_NAME)


@dataclass(frozen=True, kw_only=True)
class Strength(Inspect):
    """The arguments of `strength`."""

    strengths: str = setting("0,0.25,0.5,0.75,1", "Strengths to measure at", **NUMBERS)
    dataset: str = setting("", "The adapter's text; empty takes the one it was trained on", **A_TEXT)
    eval_iters: int = setting(40, "Batches of held-out text", low=1, **ONLY_HERE)


@dataclass(frozen=True, kw_only=True)
class Merge(Machine):
    """The arguments of `merge`."""

    name: str = setting("", "The LoRA run to merge into its base", place="NAME", **A_NAME)
    out: str = setting("", "Name of the new run", required=True, **A_NAME)
    dataset: str = setting("", "The text to verify on; empty takes the adapter's or else the base's", **A_TEXT)


@dataclass(frozen=True, kw_only=True)
class Combine(Machine):
    """The arguments of `combine`."""

    names: tuple[str, ...] = setting((), "LoRA runs on one base", place="NAME", **A_NAME)
    weights: str = setting("", "A number for each; empty gives all the same, 1 together", **NUMBERS)
    method: str = setting(
        "linear", "linear and cat are exact, cat with all ranks stacked; svd cuts to --rank",
        choices=("linear", "cat", "svd"), **ONLY_HERE,
    )  # fmt: skip
    rank: int | None = setting(None, "The rank that svd cuts to", low=1, **ONLY_HERE)
    out: str = setting("", "Name of the new run", required=True, **A_NAME)


@dataclass(frozen=True, kw_only=True)
class Check(Machine):
    """The arguments of `check`."""

    path: str = setting("", "A run, an adapter's or a model's folder, or a file", place="FILE_OR_FOLDER", **A_PATH)
    base: str = setting("", "The base to compare with; empty takes the one it names", **A_NAME)


@dataclass(frozen=True, kw_only=True)
class Import(Machine):
    """The arguments of `import`."""

    folder: str = setting("", "An adapter's folder, as PEFT writes it", place="FOLDER", **A_PATH)
    base: str = setting("", "The run whose model it was trained on", required=True, **A_NAME)
    out: str = setting("", "Name of the new run", required=True, **A_NAME)


@dataclass(frozen=True, kw_only=True)
class Export(Machine):
    """The arguments of `export`."""

    name: str = setting("", "The LoRA run to export", place="NAME", **A_NAME)
    out: str = setting("", "The new folder", required=True, **A_PATH)
