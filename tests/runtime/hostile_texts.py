"""Texts that no setting expects, texts that come near to what one does, and how many of them a test tries."""

from __future__ import annotations

import math
import os
from collections.abc import Collection

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from runtime.settings.fields import Setting

SOAK = bool(os.environ.get("SOAK"))

# fmt: off
HOSTILE = (
    "", " ", "\t", "\n", "\r\n", "\0", "\0001", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\u200b", "\ufeff",
    "\u3000", "\udcff", "\ud800", "1\udcff", "😀", "e\u0301", "é" * 90, "nan", "NaN", "inf", "-inf", "Infinity",
    "1e999", "-1e999", "1e-999", "0x10", "0b1", "0o7", "1_000", "1_0.0", "٣", "١.٥", "８", "²", "½", "Ⅷ", "1,5",
    "1 000", "1e", "e1", ".", "+", "+1", "-0", "-", "--", "---", "-1", "-.5", "-x", "--seed", "--seed=1", "--no-fresh",
    "--\n", "=", "==", "=1", "a=b", "SEED=1", "'", '"', "''", '""', "'x", '"x', "'1'", '"1"', "`x`", "$(x)", "$HOME",
    "${HOME}", "${NOWHERE}", "${NOWHERE:-1}", "${", "$", "${}", "%", "%s", "%(default)s", "{}", "{0}", "{x!r}", "\\",
    "\\n", "\\'", "C:\\new", "#", "a #b", "a#b", "1 # one", "None", "NONE", "null", "True", "tRUE", "yes", "oN", "OFF",
    "no", "t", "y", "2", "enabled", "1.", ".5", "1.0", "1e0", "..", "../..", "/", "\\\\a\\b", "~", "CON", "nul.txt",
    "a.", ".a", "a/b", "a\nb", "1\n", "\n1", "1\nSEED=2", "a,,b", "1,", ",", "9" * 18, "9" * 19, "9" * 5000,
    "-" + "9" * 5000, "0" * 5000 + "1", "0." + "0" * 5000 + "1", "1e" + "9" * 5000, "9" * 400 + "x", "x" * 10_000,
    " " * 3000, "\n" * 1000, "a,b" * 1000, "\udcff" * 500, "😀" * 1000,
)
# fmt: on


def tries(quick: int, soak: int) -> settings:
    """So many examples, the same ones each time."""
    return settings(
        max_examples=soak if SOAK else quick,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def report(what: str, counted: Collection, struck: Collection, more: str = "") -> None:
    """Say how many points there are and how many were struck, and fail where these are not the same."""
    print(f"{what}: {len(counted)} points counted, {len(struck)} struck{more}")
    assert set(struck) == set(counted), sorted(map(str, set(counted) ^ set(struck)))


def texts_for(row: Setting) -> st.SearchStrategy[str]:
    """Hostile texts for a setting: known ones, near ones, any at all, and two in one."""
    anything = st.text(st.characters(), max_size=30) | st.integers().map(str) | st.floats().map(repr)
    known = st.sampled_from(HOSTILE)
    return st.sampled_from(candidates(row)) | known | anything | st.tuples(known, known).map("".join)


def at_bounds(row: Setting) -> list[str]:
    """Texts of the numbers at a setting's bounds and next to them, on both sides."""
    bounds = [bound for bound in (row.low, row.high) if bound is not None]
    if row.kind is int:
        return [str(bound + step) for bound in bounds for step in (-1, 0, 1)]
    beside = [math.nextafter(bound, towards) for bound in bounds for towards in (-math.inf, bound, math.inf)]
    return [repr(value) for value in beside] + [str(bound) for bound in bounds]


def forms_of_number(text: str) -> list[str]:
    """One number as people and programs write it, some of it not allowed."""
    arabic = text.translate({ord("0") + digit: chr(0x660 + digit) for digit in range(10)})
    return [
        text,
        f"+{text}",
        f"{text}.0",
        f"{text}e0",
        f"00{text}",
        f" {text} ",
        f"{text}_0",
        arabic,
        hex(int(float(text))),
    ]


def candidates(row: Setting) -> list[str]:
    """Texts that come near to what a setting allows, and some that are allowed."""
    if row.kind is bool:
        return ["true", "0", "Yes", "oFF", "truee", "10"]
    if row.kind in (int, float):
        return [form for text in at_bounds(row) for form in forms_of_number(text)]
    known = [
        *(row.choices or ()),
        "tensorboard",
        "a/b",
        "a",
        "./a",
        "4,8",
        "all",
        "auto",
        "cuda:0",
        "q_proj, v_proj",
        "0.5,-1e2",
    ]
    return [form for text in known for form in (text, text.upper(), f"{text} ", f"{text}x", f"{text},")]
