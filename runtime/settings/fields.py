"""What a setting is: a dataclass field that knows its help, its bounds and its defaults, and reads itself from text.

A table of settings is a frozen dataclass that inherits `Table` and consists of `setting(...)` fields.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from runtime.errors import UsageError

BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
WHOLE = re.compile(r"[+-]?[0-9]{1,18}")  # int() also takes "1_0" and Arabic digits, and fails on 5,000 digits
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")  # one way to read each: long text is quick
ONE_LINE = r"[^\x00-\x1f\x7f\ud800-\udfff]*"  # surrogates: bytes that are not UTF-8, which JSON could not carry


class BadValueError(UsageError, ValueError):
    """A value that its setting does not allow, or settings that are not of this table."""


class ContradictionError(BadValueError):
    """Two settings that are each allowed but not together; `left` and `right` are their names."""

    def __init__(self, table: Table, left: str, relation: str, right: str):
        self.left, self.relation, self.right = left, relation, right
        self.values = {name: getattr(table, name) for name in (left, right)}
        super().__init__(f"{left.upper()}={self.values[left]} {relation} {right.upper()}={self.values[right]}")


def setting(default: Any, help: str, **described: Any) -> Any:
    """A dataclass field that is a setting; `described` takes fields of `Setting`, of which `group` is required."""
    return field(default=default, metadata={"help": help, **described})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of a table: what is known of a setting.

    `kind` is bool, int, float, str, or tuple for a flag that may be repeated; `others` are other defaults, by the
    preset that has them. `pattern` is a regular expression for text, put into words by `allowed`, and `path=True` a
    folder or file, whose ~ is expanded; `env=False` makes a setting a flag only, `required=True` one that must be
    given, and `metavar="NAME"` words without a flag, shown as NAME; `identity=False` marks what does not change a
    run's result; `also="name"` is another name, by which it can be given just as well. `nothing` is the word
    for None.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    others: dict[str, Any]
    help: str
    group: str
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    pattern: str = ONE_LINE
    allowed: str = ""
    path: bool = False
    env: bool = True
    metavar: str = ""
    required: bool = False
    identity: bool = True
    also: str = ""
    nothing: str = "none"

    @property
    def spellings(self) -> tuple[Setting, ...]:
        """The row by each of its names, the own one first."""
        return (self, dataclasses.replace(self, name=self.also)) if self.also else (self,)

    @property
    def variable(self) -> str:
        """The name in the environment and in .env."""
        return self.name.upper()

    @property
    def flag(self) -> str:
        """The name on the command line."""
        return self.metavar or "--" + self.name.replace("_", "-")

    @property
    def must_be(self) -> str:
        """What a value must be, in words."""
        return self._kind_in_words() + (f" or {self.nothing}" if self.optional else "")

    def shown(self, value: Any) -> str:
        """A value as text that fits into one line of a message, in this setting's words."""
        return self.nothing if value is None else format_value(value)

    def parse(self, text: str | tuple[str, ...]) -> Any:
        """The value that a text stands for; ValueError where it is not allowed."""
        words = ("", "none") if self.nothing == "none" else (self.nothing,)
        if self.optional and text.lower() in words:
            return None
        if self.kind is bool:
            return self.check(BOOLEANS.get(text.lower(), text))
        if self.kind is int:
            return self.check(int(text) if WHOLE.fullmatch(text) else text)
        if self.kind is float:
            return self.check(float(text) if DECIMAL.fullmatch(text) else text)
        if self.kind is tuple:
            return self.check((text,) if isinstance(text, str) else text)
        # Path.expanduser would fail on ~nobody, and write ./a as a.
        return self.check(os.path.expanduser(text) if self.path else text)  # noqa: PTH111

    def check(self, value: Any) -> Any:
        """The value if it is allowed, with JSON's whole numbers and lists turned into this setting's type."""
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int and abs(value) < 10**18:
            value = float(value)
        if self.kind is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not self.kind or not self._within(value):
            raise BadValueError(f"{self.variable}={format_value(value)}: must be {self.must_be}")
        return value

    def _within(self, value: Any) -> bool:
        if self.kind is str:
            return value in self.choices if self.choices else re.fullmatch(self.pattern, value) is not None
        if self.kind is tuple:
            free = self.pattern == ONE_LINE  # of a flag that may be repeated, a value may have several lines
            return all(isinstance(item, str) and (free or re.fullmatch(self.pattern, item)) for item in value)
        above = self.low is None or value > self.low or (value == self.low and not self.low_open)
        below = self.high is None or value < self.high or (value == self.high and not self.high_open)
        return math.isfinite(value) and above and below

    def _kind_in_words(self) -> str:
        if self.kind is bool:
            return "true or false (also yes, no, on, off, 1, 0)"
        if self.kind in (int, float):
            return ("a whole number" if self.kind is int else "a number") + self._bounds_in_words()
        return "one of " + ", ".join(self.choices) if self.choices else self.allowed or "text on one line"

    def _bounds_in_words(self) -> str:
        if None not in (self.low, self.high) and not (self.low_open or self.high_open):
            return f" from {self.low} to {self.high}"
        low = "" if self.low is None else f" {'above' if self.low_open else 'of at least'} {self.low}"
        high = "" if self.high is None else f" {'below' if self.high_open else 'of at most'} {self.high}"
        return low + (" and" if low and high else "") + high


def format_value(value: Any) -> str:
    """A value as text that fits into one line of a message."""
    if value is None:
        return "none"
    text = ", ".join(map(format_value, value)) if isinstance(value, tuple) else str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."


@functools.cache
def settings_of(cls: type[Table]) -> tuple[Setting, ...]:
    """The rows of a table, its own before those it inherits."""
    hints = typing.get_type_hints(cls)
    own = sorted(dataclasses.fields(cls), key=lambda item: item.name not in cls.__annotations__)
    return tuple(_setting(cls, item, hints[item.name]) for item in own)


def _setting(cls: type[Table], item: dataclasses.Field, hint: Any) -> Setting:
    optional = isinstance(hint, types.UnionType)
    if optional:
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    others = {label: preset[item.name] for label, preset in cls.presets.items() if item.name in preset}
    known = {"name": item.name, "default": item.default, "others": others, "optional": optional}
    return Setting(kind=typing.get_origin(hint) or hint, **known, **item.metadata)


def resolve(cls: type[Table], given: Mapping[str, Any]) -> Any:
    """A table with these values, and for all others the default that holds beside them; ValueError if not allowed."""
    rows = settings_of(cls)
    unknown = sorted(given.keys() - {row.name for row in rows})
    if unknown:
        raise BadValueError(f"not settings: {', '.join(map(format_value, unknown))}")
    values = {row.name: row.default for row in rows}
    active = cls.active(values | dict(given))
    for label, preset in cls.presets.items():
        values |= preset if label in active else {}
    return cls(**cls.fitted(values | dict(given), given))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of settings. However it is made, every value is of its type and within its bounds.

    `presets` are groups of other defaults, by their labels; where several hold, the last one decides. `often` names the
    settings that --help shows, where it does not show all.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    often: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for row in settings_of(type(self)):
            object.__setattr__(self, row.name, row.check(getattr(self, row.name)))

    @classmethod
    def active(cls, values: Mapping[str, Any]) -> set[str]:
        """The labels of the presets that hold beside these values."""
        return set()

    @classmethod
    def fitted(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """`values` with such defaults changed as must follow what was given."""
        return values

    def as_dict(self) -> dict[str, Any]:
        """All values, ready for JSON; `from_dict` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The table that `as_dict` wrote; ValueError for unknown names, wrong types and values out of bounds."""
        if not isinstance(values, Mapping):
            raise BadValueError(f"settings must be a mapping of names to values, not {type(values).__name__}")
        return resolve(cls, {str(name): value for name, value in values.items()})

    def identity(self) -> dict[str, Any]:
        """The values that decide what a run computes."""
        return {row.name: getattr(self, row.name) for row in settings_of(type(self)) if row.identity}
