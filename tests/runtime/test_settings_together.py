"""Several settings at once, good and hostile, each from several sources: who wins, and who contradicts whom."""

from __future__ import annotations

import ast
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hostile_settings import MODEST, REFUSED, Given, as_read, carried, give, meaning, outcome, source_of, told
from hostile_texts import candidates, report, texts_for, tries
from hypothesis import given
from hypothesis import strategies as st

from runtime.settings.config import Settings
from runtime.settings.fields import ContradictionError, format_value, resolve, settings_of
from runtime.settings.sources import Resolved

ROOT = Path(__file__).resolve().parents[2]
ROWS = [row for row in settings_of(Settings) if row.env]
BY_NAME = {row.name: row for row in ROWS}
SOURCES = ("--flag=text", "environment", ".env")  # in the order in which they win


@st.composite
def several(draw) -> dict[str, dict[str, str]]:
    """Texts for some settings, each from one or more sources: mostly good ones."""
    rows = draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=8, unique_by=lambda row: row.name))
    found = {}
    for row in rows:
        good = [text for text in candidates(row) if meaning(row, ".env", text) is not REFUSED]
        text = st.sampled_from(good) if draw(st.integers(0, 15)) else texts_for(row)
        sources = draw(st.lists(st.sampled_from(SOURCES), min_size=1, max_size=3, unique=True))
        found[row.name] = {form: carried(form, draw(text)) for form in sources}
    return found


def all_given(texts) -> Given:
    """The command line, environment and .env of several settings at once."""
    argv, environ, lines = [], {"DOLLAR": "$"}, []
    for name, by_form in texts.items():
        for form, text in by_form.items():
            one = give(Settings, BY_NAME[name], form, text)
            argv += one.argv
            environ |= dict(one.environ)
            lines.append(one.dotenv)
    return Given(tuple(argv), tuple(environ.items()), "".join(lines))


def winners(texts) -> dict[str, tuple[str, str]]:
    """The form and text that must count for each setting: a flag's, else the environment's, else .env's."""
    forms = {name: next(form for form in SOURCES if form in by_form) for name, by_form in texts.items()}
    return {name: (form, texts[name][form]) for name, form in forms.items()}


def as_told(won, name, value) -> str:
    """How a message must name a setting that was given, or left to its default."""
    if name not in won:
        return f"{name.upper()}={value} (default)"
    form, text = won[name]
    return told(BY_NAME[name], form, as_read(form, text))


def check_several(texts, folder) -> str:
    """What comes of several settings at once: each from the source that wins, or a line about one or two of them."""
    won = winners(texts)
    values = {name: meaning(BY_NAME[name], form, text) for name, (form, text) in won.items()}
    came_to = outcome(Settings, all_given(texts), folder)
    if bad := [name for name in values if values[name] is REFUSED]:
        assert came_to in [f"{as_told(won, name, None)}: must be {BY_NAME[name].must_be}" for name in bad]
        return "refused"
    if isinstance(came_to, str):
        with pytest.raises(ContradictionError) as error:
            resolve(Settings, values)
        left, right = (as_told(won, name, error.value.values[name]) for name in (error.value.left, error.value.right))
        assert came_to == f"{left} {error.value.relation} {right}"
        return "clashing"
    assert came_to.sources == {name.upper(): source_of(BY_NAME[name], form) for name, (form, _) in won.items()}
    assert came_to.settings == resolve(Settings, values)
    assert {name: getattr(came_to.settings, name) for name in values} == values
    check_written(came_to.settings, folder)
    return "taken"


def check_written(s, folder) -> None:
    """Settings come back the same from saved settings, and from lines as they stand in .env.example."""
    assert Settings.from_dict(json.loads(json.dumps(s.as_dict()))) == s
    written = {name.upper(): format_value(value) for name, value in s.as_dict().items()}
    if all(MODEST.fullmatch(value) and len(value) < 80 for value in written.values() if value):
        lines = [f"{name}={value}\n" for name, value in written.items()]
        came_to = outcome(Settings, Given(dotenv="".join(lines)), folder)
        assert isinstance(came_to, Resolved) and came_to.settings == s, came_to


def test_of_several_settings_each_comes_from_the_source_that_wins(tmp_path):
    tally = Counter()

    @tries(150, 10_000)
    @given(several())
    def strike_several(texts):
        tally[check_several(texts, tmp_path)] += 1

    strike_several()
    print(f"several settings at once: {dict(tally)}")
    assert set(tally) == {"taken", "refused", "clashing"}


def clashes() -> dict[tuple[str, str], dict[str, str]]:
    """Texts that contradict each other, for each pair of settings that config.py says may do so."""
    tree = ast.parse((ROOT / "runtime" / "settings" / "config.py").read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    pairs = [call.args[1::2] for call in calls if ast.unparse(call.func) == "ContradictionError"]
    return {(left.value, right.value): clashing_texts(left.value, right.value) for left, right in pairs}


def clashing_texts(left: str, right: str) -> dict[str, str]:
    """Two texts that are each allowed but not together, perhaps only in a LoRA run."""
    for lora, (one, other) in itertools.product(("False", "True"), itertools.permutations(("0.1", "0.2", "3", "4"), 2)):
        texts = {"use_lora": lora, left: one, right: other}
        values = {name: meaning(BY_NAME[name], ".env", text) for name, text in texts.items()}
        try:
            if REFUSED not in values.values():
                resolve(Settings, values)
        except ContradictionError as error:
            if (error.left, error.right) == (left, right):
                return texts
    raise AssertionError(f"{left} and {right} never clash")


def test_settings_that_contradict_each_other_are_both_named_with_their_sources(tmp_path):
    found = clashes()
    counted, struck = set(itertools.product(found, SOURCES, SOURCES)), set()
    for pair, *forms in counted:
        by_form = dict(zip(pair, forms, strict=True))
        texts = {name: {by_form.get(name, "environment"): text} for name, text in found[pair].items()}
        if check_several(texts, tmp_path) == "clashing":
            struck.add((pair, *forms))
    report("contradictions", counted, struck)
    assert len(found) >= 3
