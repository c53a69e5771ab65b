"""Hostile settings: whatever is given from wherever comes to right settings or to one line that says what is wrong.

SOAK=1 tries many more texts.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_settings import (
    REFUSED,
    TABLES,
    Given,
    as_read,
    carried,
    distinct_rows,
    forms_of,
    give,
    is_plain,
    meaning,
    outcome,
    shown,
    source_of,
    told,
)
from hostile_texts import report, texts_for, tries
from hypothesis import example, given

from runtime.settings.config import Settings
from runtime.settings.fields import ContradictionError, resolve, settings_of
from runtime.settings.spelling import SHELLS_OWN

ROOT = Path(__file__).resolve().parents[2]


# --- one setting at a time ------------------------------------------------------------------------------------------


def test_all_commands_are_struck():
    readers = {path.name for path in ROOT.glob("*.py") if "from_command_line(" in path.read_text("utf-8")}
    assert readers == {name.split()[0] for name in TABLES}


def check_taken(row, form, right, resolved) -> None:
    """The value is what the text says, its source is told, and saved settings come back the same."""
    value = getattr(resolved.settings, row.name)
    assert right is not REFUSED and value == right and type(value) is type(right)
    assert resolved.sources[row.variable] == source_of(row, form)
    saved = json.loads(json.dumps(resolved.settings.as_dict()))
    assert type(resolved.settings).from_dict(saved) == resolved.settings


def check_refused(table, row, form, text, right, line) -> str:
    """The line names setting, value, source and what is allowed, or two settings that clash; tells which."""
    twice = row.kind is tuple and form == "--flag twice"
    named = told(row, form, (text, text) if twice else text)
    if right is REFUSED:
        assert line == f"{named}: must be {row.must_be}"
        return "refused"
    with pytest.raises(ContradictionError):
        resolve(table, {row.name: right})
    assert named in line and "(default)" in line and " must " in line
    return "clashing"


def strike(table, row, form, text, folder) -> str:
    """Give one text in one form: taken, refused, clashing with a default, or another thing than this one value."""
    text = carried(form, text)
    came_to = outcome(table, give(table, row, form, text), folder)
    if not is_plain(row, form, text):
        named = (row.flag, shown(text), ".env" if form == ".env unquoted" else "are required: ")
        assert not isinstance(came_to, str) or any(part in came_to for part in named)
        return "other"
    if form == "environment" and re.fullmatch(SHELLS_OWN.get(row.variable, "(?!)"), text.strip()):
        assert row.variable not in came_to.sources  # a shell's, and none of ours
        return "other"
    right, text = meaning(row, form, text), as_read(form, text)
    if isinstance(came_to, str):
        return check_refused(table, row, form, text, right, came_to)
    check_taken(row, form, right, came_to)
    return "taken"


def strike_everywhere(table, row, folder, struck, tally) -> None:
    """Give hostile texts for one setting in all its forms, and note what was really struck."""

    @tries(4, 60)
    @given(text=texts_for(row))
    @example(text="1")
    def strike_each_form(text):
        for form in forms_of(row):
            verdict = strike(table, row, form, text, folder)
            tally[verdict] += 1
            if verdict != "other":
                struck.add((row.name, form))

    strike_each_form()


@pytest.mark.parametrize("command", TABLES)
def test_any_text_for_any_setting_from_any_source_is_right_settings_or_one_line(command, tmp_path):
    table, struck, tally = TABLES[command], set(), Counter()
    for row in settings_of(table):
        strike_everywhere(table, row, tmp_path, struck, tally)
    counted = {(row.name, form) for row in settings_of(table) for form in forms_of(row)}
    report(f"python {command}", counted, struck, f" ({dict(tally)})")
    assert tally["taken"] and tally["refused"]


@pytest.mark.parametrize("text", ["--", "many"])
def test_dashes_and_words_are_no_numbers_nor_nothing(text, tmp_path):
    for table, row in distinct_rows():
        right = meaning(row, "--flag=text", text)
        if not row.metavar:
            verdict = strike(table, row, "--flag=text", text, tmp_path)
            assert verdict == ("refused" if right is REFUSED else "taken"), row.name


# --- bounds and booleans --------------------------------------------------------------------------------------------


def edges(row) -> Iterator[tuple[str, bool]]:
    """The numbers at each bound and next to it on both sides, as text, and whether they are allowed."""
    for bound, is_open, inwards in ((row.low, row.low_open, 1), (row.high, row.high_open, -1)):
        if bound is not None and row.kind is int:
            yield from ((str(bound - inwards), False), (str(bound), True), (str(bound + inwards), True))
            yield from ((f"{bound}.0", False), (f"{bound + inwards}e0", False))
        elif bound is not None:
            beyond, inside = (math.nextafter(bound, towards * inwards) for towards in (-math.inf, math.inf))
            yield from ((repr(beyond), False), (repr(float(bound)), not is_open), (repr(inside), True))
            yield str(bound), not is_open  # a number may be written without a point


def usual_forms(row) -> list[str]:
    """The forms that carry any text, each source once."""
    return [form for form in forms_of(row) if form not in ("--flag twice", ".env unquoted")]


def test_every_number_is_taken_up_to_its_bounds_and_refused_beyond_them_from_every_source(tmp_path):
    numbers = [(table, row) for table, row in distinct_rows() if row.kind in (int, float)]
    counted = [(row.name, form, text) for _, row in numbers for form in usual_forms(row) for text, _ in edges(row)]
    struck = []
    for table, row in numbers:
        for form, (text, allowed) in itertools.product(usual_forms(row), edges(row)):
            verdict = strike(table, row, form, text, tmp_path)
            assert (verdict in ("taken", "clashing")) == allowed, (row.name, form, text, verdict)
            struck.append((row.name, form, text))
    report("numbers at their bounds", counted, struck)


TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NEITHER = ("", "t", "f", "y", "n", "2", "-1", "00", "1.0", "None", "null", "enabled", "truee", "on off", "１")


def test_a_boolean_is_read_in_all_the_forms_that_people_write_and_in_no_other(tmp_path):
    cases = (str, str.upper, str.title, lambda word: word.title().swapcase())
    expected = {case(word): word in TRUE for case in cases for word in TRUE + FALSE} | dict.fromkeys(NEITHER, REFUSED)
    booleans = [(table, row) for table, row in distinct_rows() if row.kind is bool]
    counted = [(row.name, form, text) for _, row in booleans for form in usual_forms(row) for text in expected]
    struck = []
    for table, row in booleans:
        for form, (text, value) in itertools.product(usual_forms(row), expected.items()):
            verdict = strike(table, row, form, text, tmp_path)
            assert meaning(row, form, text) is value
            assert verdict == ("refused" if value is REFUSED else "taken"), (row.name, form, text)
            struck.append((row.name, form, text))
    report("booleans as people write them", counted, struck)


def test_a_boolean_flag_needs_no_value_and_has_an_opposite(tmp_path):
    for table, row in distinct_rows():
        if row.kind is bool:
            words = ["a" for other in settings_of(table) if other.metavar]
            words += [f"{other.flag}=a" for other in settings_of(table) if other.required]
            for flag, value in ((row.flag, True), (row.flag.replace("--", "--no-", 1), False)):
                assert getattr(outcome(table, Given((*words, flag)), tmp_path).settings, row.name) is value


@pytest.mark.parametrize("end", ["", "x", "e", ".", "-"])
def test_a_long_text_is_read_in_no_time(end, tmp_path):
    for row in settings_of(Settings):
        began = time.process_time()
        strike(Settings, row, "--flag=text", "9" * 20_000 + end, tmp_path)
        assert time.process_time() - began < 1, row.name
