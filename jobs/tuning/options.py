"""The flags of `tune.py`, and what of them goes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jobs.tuning.space import SEARCHED, Values, space_of
from runtime.errors import UsageError
from runtime.settings.config import NAME, NAMED, PRESETS, Settings
from runtime.settings.fields import setting, settings_of
from runtime.settings.sources import Resolved

TUNED = "What to search, and how long"
VALUES = {"group": TUNED, "env": False}
INSTEAD = {  # flags of training.py that a study would ignore: what to do instead
    "use_lora": "it searches settings of LoRA",
    "run_name": "its runs are named after --study",
    "fresh": "another --study begins anew",
    "dry_run": "training.py tells it, of one run",
    **dict.fromkeys(("push_to_hub", "push_strategy", "push_private"), "export.py --push does it, of one run"),
}


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The flags of tune.py, beside all settings of a training run, which are fixed where they are given."""

    presets: ClassVar = PRESETS | {"TEST_MODE": PRESETS["TEST_MODE"] | {"trials": 4}}

    study: str = setting(
        "lora", "Name of the study, and of its runs: tune-STUDY-NUMBER", **VALUES, pattern=NAME, allowed=NAMED
    )
    trials: int = setting(20, "Number of trials, those of all processes together", **VALUES, low=1, high=10**5)
    jobs: int = setting(
        1, "Number of processes that share the study, and this machine's cores", **VALUES, low=1, high=256
    )
    seeds: int = setting(
        3, "Seeds with which the best settings and the defaults are trained at the end; 0 compares nothing",
        **VALUES, low=0, high=100,
    )  # fmt: skip
    only_trials: bool = setting(
        False, "Run trials and show nothing at the end, as a further process on a study of this name", **VALUES
    )
    ranks: str = setting("4,8,16,32", "Values of LORA_RANK: a list, or a range as 4..64", **VALUES)
    alphas: str = setting("8,16,32", "Values of LORA_ALPHA, likewise", **VALUES)
    dropouts: str = setting("0,0.05,0.1", "Values of LORA_DROPOUT, likewise", **VALUES)
    learning_rates: str = setting(
        "", "Values of LEARNING_RATE, likewise; by default from an eighth of its default to four times that", **VALUES
    )
    targets: str = setting("minimal,standard,all", "Presets of LORA_TARGETS", **VALUES)
    variants: str = setting("lora,rslora,dora", "Kinds of LORA_VARIANT", **VALUES)

    @classmethod
    def active(cls, values: Mapping[str, Any]) -> set[str]:
        """A study adapts a base with LoRA, whether or not USE_LORA says so."""
        return super().active(dict(values) | {"use_lora": True})


def check_flags(given: Resolved) -> None:
    """Raises UsageError for a flag that a study would ignore; in the environment it may be meant for others."""
    for name, instead in INSTEAD.items():
        if given.sources.get(name.upper(), "").startswith("flag"):
            raise UsageError(f"tune.py does not take --{name.replace('_', '-')}: {instead}")


def fixed_settings(given: Resolved) -> dict[str, Any]:
    """The settings of a training run that were given, by name."""
    return {row.name: getattr(given.settings, row.name) for row in settings_of(Settings) if given.explicit(row.name)}


def searched_space(given: Resolved) -> list[Values]:
    """What is searched. Raises UsageError as `space_of` does."""
    own = {row.name for row in settings_of(Options) if given.explicit(row.name)}
    texts = {flag: getattr(given.settings, flag) for flag in SEARCHED}
    return space_of(texts, own, set(fixed_settings(given)), given.settings.learning_rate)
