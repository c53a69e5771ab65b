"""What is searched: for each setting a list of values, or a range."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import UsageError
from runtime.settings.config import Settings
from runtime.settings.fields import settings_of

if TYPE_CHECKING:
    from optuna.trial import Trial

SEARCHED = {  # flags of tune.py: the setting that each searches
    "ranks": "lora_rank",
    "alphas": "lora_alpha",
    "dropouts": "lora_dropout",
    "learning_rates": "learning_rate",
    "targets": "lora_targets",
    "variants": "lora_variant",
}
ROWS = {row.name: row for row in settings_of(Settings)}
RANGE = re.compile(r"([^,]+?)\.\.([^,]+)")


@dataclass(frozen=True)
class Values:
    """The values of one setting that may be tried: these, or any number from the first to the last of two.

    A range goes by factors (in the logarithm), unless it begins at 0.
    """

    name: str
    values: tuple[Any, ...]
    is_range: bool

    @classmethod
    def parse(cls, flag: str, text: str) -> Values:
        """`4,8,16` or `1e-4..1e-2`, for the setting that this flag of tune.py searches. Raises UsageError."""
        row, found = ROWS[SEARCHED[flag]], RANGE.fullmatch(text.strip())
        asked = f"--{flag.replace('_', '-')} {text}"
        try:
            values = tuple(row.parse(part.strip()) for part in (found.groups() if found else text.split(",")))
        except ValueError:
            raise UsageError(f"{asked}: each must be {row.must_be}") from None
        if found and (row.kind not in (int, float) or values[0] >= values[1]):
            raise UsageError(f"{asked}: a range is of numbers, from the lower to the higher one")
        return cls(row.name, tuple(dict.fromkeys(values)), bool(found))

    @property
    def by_factors(self) -> bool:
        """Whether what counts of two values is their ratio."""
        return all(isinstance(value, int | float) and value > 0 for value in self.values)

    def suggest(self, trial: Trial) -> Any:
        """The value that the study proposes next; one that it proposed to this trial before stays."""
        if not self.is_range:
            return trial.suggest_categorical(self.name, self.values)
        suggest = trial.suggest_int if isinstance(self.values[0], int) else trial.suggest_float
        return suggest(self.name, *self.values, log=self.by_factors)

    def __str__(self) -> str:
        return (".." if self.is_range else ",").join(map(shown, self.values))


def short(name: str) -> str:
    """A setting's name as it is shown: `rank` for `lora_rank`."""
    return name.removeprefix("lora_")


def told(params: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{short(name)} {shown(value)}" for name, value in params.items())


def shown(value: Any) -> str:
    """A value in three digits, or as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def space_of(texts: Mapping[str, str], given: Mapping[str, Any], fixed: set[str], rate: float) -> list[Values]:
    """What is searched: what tune.py's flags say, without settings that are given and so fixed.

    texts: by flag; empty where nothing of a setting is searched. given: the flags that were given. fixed: settings that
    were. rate: the default learning rate, around which is searched by default. Raises UsageError for both at once, and
    where nothing is left to search.
    """
    around = f"{rate / 8:.4g}..{rate * 4:.4g}"
    texts = dict(texts) | ({"learning_rates": around} if "learning_rates" not in given else {})
    for flag, name in SEARCHED.items():
        if flag in given and name in fixed:
            raise UsageError(
                f"--{flag.replace('_', '-')} searches {name.upper()}, which is given too, and so fixed; leave out one"
            )
    space = [Values.parse(flag, texts[flag]) for flag, name in SEARCHED.items() if texts[flag] and name not in fixed]
    if all(len(values.values) == 1 for values in space):
        raise UsageError("nothing is left to search: every setting has one value")
    return space
