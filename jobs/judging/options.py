"""The flags of `evaluate.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UsageError
from runtime.settings.config import FOLDER, ProcessSettings
from runtime.settings.fields import setting
from runtime.storage import folders

WHAT, HOW, RULES = ({"group": title, "env": False} for title in ("What to judge", "Sampling", "Rules"))
A_PATH = {"pattern": rf"|{FOLDER}", "path": True, "allowed": "a path", **WHAT}


@dataclass(frozen=True, kw_only=True)
class Options(ProcessSettings):
    """The flags of evaluate.py."""

    run: str = setting(
        "", "A run, or the Hugging Face folder or hub name of a model", metavar="RUN",
        **A_PATH | {"pattern": FOLDER, "allowed": "a run's name, a folder, or a name on the hub"},
    )  # fmt: skip
    data: str = setting("", "Records to ask, as DATASET names them; empty takes those that the run held out", **A_PATH)
    columns: str | None = setting(
        None, "Columns of --data that have other names, as instruction=question; none takes the run's", **WHAT
    )
    limit: int = setting(100, "Prompts at most, spread evenly; 0 takes all", low=0, high=10**6, **WHAT)
    base_text: str = setting(
        "", "A corpus or a text file to measure forgetting on; empty takes the text that the base was trained on",
        **A_PATH,
    )  # fmt: skip
    strength: float | None = setting(None, "Strength of a LoRA run's adapter; none is 1", low=-100, high=100, **WHAT)
    out: str = setting("", "A new folder for report.json, report.md and answers.jsonl", **A_PATH)

    max_new_tokens: int = setting(256, "Tokens of an answer at most", low=1, high=10**6, **HOW)
    temperature: float = setting(
        0.0, "Logits are divided by this; 0 takes the likeliest token, 0.2 to 0.4 is usual for instructions", low=0,
        high=100, **HOW,
    )  # fmt: skip
    top_k: int | None = setting(40, "With a temperature, choose among this many likeliest tokens", low=1, **HOW)
    top_p: float | None = setting(
        0.9, "With a temperature, choose among the likeliest tokens that reach this probability", low=0, low_open=True,
        high=1, **HOW,
    )  # fmt: skip

    tolerance: float = setting(
        25.0, "How far off the wanted length an answer may be, in per cent", low=0, high=1000, **RULES
    )
    short: int = setting(25, "Words of a short answer at most", low=1, high=10**6, **RULES)
    medium: int = setting(100, "Words of a medium answer at most", low=1, high=10**6, **RULES)
    word_list: str = setting(
        "", "A file of words and phrases, one a line, that no answer should have; empty takes a few profane ones",
        **A_PATH | RULES,
    )  # fmt: skip


def check_flags(options: Options) -> None:
    """Raises UsageError for flags that contradict one another, and a word list that is not there."""
    if options.short >= options.medium:
        raise UsageError(f"--short {options.short} must be less than --medium {options.medium}")
    if options.columns and not options.data:
        raise UsageError("--columns are those of --data, which is not given")
    if options.word_list:
        folders.check_there(Path(options.word_list))
