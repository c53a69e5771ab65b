"""The table of settings: defaults in every mode, bounds, cross-checks, and the texts generated from it."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import UsageError, UserError
from runtime.settings.config import PRESETS, Settings
from runtime.settings.fields import resolve, settings_of
from runtime.settings.listing import PAGE, env_example, markdown_table, rewrite, with_settings
from runtime.settings.sources import read_settings

ROOT = Path(__file__).resolve().parents[2]
ROWS = settings_of(Settings)
PLAIN = Settings()
NUMBERS = [row for row in ROWS if row.kind in (int, float)]


def read(**environ: str) -> Settings:
    return read_settings(Settings, [], environ, ROOT / "no .env", prog="training.py", description="").settings


def refused(**environ: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(**environ)
    return str(caught.value)


# --- defaults -------------------------------------------------------------------------------------------------------


def expected_default(row, lora: bool, base: bool, test: bool):
    """The documented precedence, said a second way: the most special default that applies."""
    labels = (test and lora, "TEST_MODE with LoRA"), (test, "TEST_MODE"), (lora, "LoRA"), (lora or base, "from a base")
    for applies, label in labels:
        if applies and row.name in PRESETS[label]:
            return PRESETS[label][row.name]
    return row.default


@pytest.mark.parametrize(("lora", "base", "test"), list(itertools.product([False, True], repeat=3)))
def test_defaults_in_every_mode(lora, base, test):
    given = {"use_lora": lora, "test_mode": test} | ({"base": "some-base"} if base else {})
    found = resolve(Settings, given)
    for row in ROWS:
        if row.name not in given:
            assert getattr(found, row.name) == expected_default(row, lora, base, test), row.name
    assert found.adapting == (lora or base)


def test_a_given_value_wins_over_every_mode():
    assert read(USE_LORA="1", TEST_MODE="1", MAX_ITERS="7").max_iters == 7


def test_defaults_are_allowed_and_of_their_type():
    for row in ROWS:
        for value in (row.default, *row.others.values()):
            assert row.check(value) is value
    assert {name for preset in PRESETS.values() for name in preset} <= {row.name for row in ROWS}


# --- bounds and cross-checks ----------------------------------------------------------------------------------------


def beside(row, bound, *, inside: bool, open_: bool, towards: int):
    """The last allowed value at a bound, or the first that is not."""
    if row.kind is int:
        return bound if inside else bound - towards
    if open_:
        return bound + towards * 1e-9 if inside else bound
    return bound if inside else bound - towards * 1e-9


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
def test_every_number_at_its_bounds(row):
    for bound, open_, towards in ((row.low, row.low_open, 1), (row.high, row.high_open, -1)):
        if bound is not None:
            inside = beside(row, bound, inside=True, open_=open_, towards=towards)
            assert row.parse(repr(inside)) == inside
            with pytest.raises(ValueError, match=row.variable):
                row.parse(repr(beside(row, bound, inside=False, open_=open_, towards=towards)))


def test_every_number_has_a_lower_bound_and_shares_stay_below_one():
    assert all(row.low is not None for row in NUMBERS)
    for name in ("DROPOUT", "LORA_DROPOUT", "BETA1", "BETA2"):
        assert refused(**{name: "1"}) == f"{name}=1 (from the environment): must be a number of at least 0 and below 1"


@pytest.mark.parametrize("row", [row for row in ROWS if row.choices], ids=lambda row: row.name)
def test_choices(row):
    for choice in row.choices:
        assert row.parse(choice) == choice
    assert refused(**{row.variable: "other"}).endswith("must be one of " + ", ".join(row.choices))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"N_HEAD": "503"},
            f"N_EMBD={PLAIN.n_embd} (default) must be divisible by N_HEAD=503 (from the environment)",
        ),
        (
            {"MAX_ITERS": "10", "WARMUP_ITERS": "11"},
            "WARMUP_ITERS=11 (from the environment) must not be more than MAX_ITERS=10 (from the environment)",
        ),
        (
            {"MIN_LR": "1"},
            f"MIN_LR=1 (from the environment) must not be more than LEARNING_RATE={PLAIN.learning_rate} (default)",
        ),
    ],
)
def test_contradictions_name_both_settings(environ, message):
    assert refused(**environ) == message


def test_a_contradicting_flag_is_named_as_a_flag():
    with pytest.raises(UsageError, match=r"--n-head 503 \(flag\)"):
        read_settings(Settings, ["--n-head", "503"], {}, "no .env", prog="", description="")


def test_a_shape_is_not_compared_with_defaults_where_it_comes_from_the_base():
    assert read(USE_LORA="1", N_HEAD="503").n_head == 503


@pytest.mark.parametrize(("iters", "warmup"), [(1, 0), (4, 0), (50, 10), (10_000, PLAIN.warmup_iters)])
def test_a_default_warmup_fits_a_short_run(iters, warmup):
    assert read(MAX_ITERS=str(iters)).warmup_iters == warmup


GOOD_NAMES = ["a", "base-shakespeare", "lora-folio-r8", "r8_a1.5", "console", "com10", "9", "x" * 100, ""]
BAD_NAMES = [".", "..", ".hidden", "-x", "a b", "CON", "nul", "Aux.txt", "com1", "LPT9.x", "a.", "é", "x" * 101, "a:b"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(name):
    assert read(RUN_NAME=name, BASE=name).run_name == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name):
    assert f"RUN_NAME={name[:70]}" in refused(RUN_NAME=name)
    assert f"BASE={name[:70]}" in refused(BASE=name)


@pytest.mark.parametrize("path", ["/tmp/my run", "../a", "C:\\runs\\a", "./a", "é/~"])
def test_a_base_may_be_a_path_and_a_run_name_may_not(path):
    assert read(BASE=path).base == path
    assert "RUN_NAME" in refused(RUN_NAME=path)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "DEVICE",
            ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:15"],
            ["gpu", "", "CPU", "cuda:", "cuda:-1", "cuda:1a"],
        ),
        (
            "LORA_TARGETS",
            ["all", "q_proj", "q_proj,v_proj", "q_proj, blocks.0.v_proj"],
            ["", ",", "a,,b", "a b", "a,", "1"],
        ),
        ("CHECKPOINTS_DIR", ["runs", "/tmp/a b"], ["", " ", "a\nb", "a\0", "\udcff"]),
        ("DATASET", ["milton", "texts/mine.txt"], [""]),
    ],
)
def test_texts_with_a_form(name, good, bad):
    for text in good:
        assert read(**{name: text}).as_dict()[name.lower()] == text
    for text in bad:
        assert refused(**{name: text}).startswith(f"{name}=")


# --- saved settings -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "use_lora": st.booleans(),
            "test_mode": st.booleans(),
            "base": st.sampled_from(["", "a", "/b"]),
            "lora_alpha": st.floats(1e-300, 1e300),
            "learning_rate": st.floats(0.1, 1e300),
            "max_iters": st.integers(1, 10**9),
            "seed": st.integers(0, 2**31 - 1),
        },
    )
)
def test_saved_settings_come_back_the_same(given):
    found = resolve(Settings, given)
    assert Settings.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert json.loads(json.dumps(found.identity())) == found.identity()


@pytest.mark.parametrize(
    "values",
    [
        {"lora_rnak": 8},
        {"LORA_RANK": 8},
        {"lora_rank": "8"},
        {"lora_rank": 8.0},
        {"lora_rank": True},
        {"lora_rank": None},
        {"lora_rank": 0},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"use_lora": 1},
        {"use_lora": "True"},
        {"base": 3},
        {"max_iters": "many"},
        {"n_embd": 255},
        {1: 2},
        ["lora_rank"],
        None,
    ],
)
def test_saved_settings_are_read_strictly(values):
    with pytest.raises(ValueError):
        Settings.from_dict(values)


def test_json_may_write_a_number_without_a_point():
    found = Settings.from_dict({"lora_alpha": 32})
    assert found.lora_alpha == 32.0 and type(found.lora_alpha) is float


def test_settings_are_frozen_and_checked_however_they_are_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().seed = 1
    with pytest.raises(ValueError, match="LORA_RANK=0: must be"):
        dataclasses.replace(Settings(), lora_rank=0)


def test_identity_is_what_the_run_computes():
    base, lora = Settings(), resolve(Settings, {"use_lora": True})
    for name in ("run_name", "fresh", "data_dir", "checkpoints_dir", "save_interval", "keep_checkpoints", "device"):
        assert name not in base.identity() | lora.identity()
    for name in ("seed", "dtype", "dataset", "max_iters", "learning_rate", "use_lora", "test_mode"):
        assert name in base.identity() and name in lora.identity()
    assert "n_embd" in base.identity() and "n_embd" not in lora.identity()
    assert "lora_rank" in lora.identity()


@pytest.mark.parametrize(
    ("given", "changes", "same"),
    [
        ({}, {"lora_rank": 16, "lora_bias": "all"}, True),
        ({}, {"vocab_size": 512}, True),
        ({"tokenizer": "bpe"}, {"vocab_size": 512}, False),
        ({}, {"n_embd": 192}, False),
        ({"use_lora": True}, {"n_embd": 192}, True),
        ({"use_lora": True}, {"lora_rank": 16}, False),
        ({"use_lora": True}, {"dropout": 0.1}, False),
        ({}, {"device": "cpu", "run_name": "x"}, True),
    ],
)
def test_what_makes_another_run(given, changes, same):
    assert (resolve(Settings, given).identity() == resolve(Settings, given | changes).identity()) == same


# --- generated texts ------------------------------------------------------------------------------------------------


def test_help_is_the_table(capsys):
    with pytest.raises(SystemExit) as caught:
        read_settings(Settings, ["--help-all"], {}, "no .env", prog="training.py", description="Train a model.")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, text.splitlines())) <= 100
    joined = " ".join(text.split())
    for row in ROWS:
        assert (
            f" {row.flag} " in joined and f"[{row.variable if row.env else 'Default'}=" in joined and row.help in joined
        )


def test_help_shows_what_people_use_most_and_how_to_see_the_rest(capsys):
    with pytest.raises(SystemExit):
        read_settings(Settings, ["--help"], {}, "no .env", prog="training.py", description="Train a model.")
    text = capsys.readouterr().out
    shown = {row.name for row in ROWS if f"  {row.flag} " in text}
    assert shown == {*Settings.often, *(row.name for row in ROWS if not row.env)} and len(Settings.often) == 20
    assert f"--help-all shows {len(ROWS) - len(shown)} settings more" in " ".join(text.split())


def test_env_example_is_the_table():
    assert (ROOT / ".env.example").read_bytes().decode() == env_example(Settings), (
        "run: python -m runtime.settings.config"
    )


def test_the_page_of_settings_is_the_table():
    page = (ROOT / PAGE).read_bytes().decode()
    assert page == with_settings(page, Settings), "run: python -m runtime.settings.config"


def test_env_example_uncommented_is_every_default(tmp_path):
    lines = env_example(Settings).splitlines()
    names = {row.variable for row in ROWS if row.env}
    kept = [line[2:] for line in lines if line[2:].partition("=")[0] in names]
    (tmp_path / ".env").write_text("\n".join(kept))
    resolved = read_settings(Settings, [], {}, tmp_path / ".env", prog="", description="")
    assert resolved.settings == Settings()
    assert resolved.sources.keys() == names


def test_the_markdown_table_shows_all_defaults_and_one_row_a_setting():
    lines = markdown_table(Settings).splitlines()
    assert all(line.replace("\\|", "").count("|") == 4 for line in lines)
    assert sum(line.startswith("| `") for line in lines) == len(ROWS)
    row = next(row for row in ROWS if row.name == "max_iters")
    others = ", ".join(f"{label} {value}" for label, value in row.others.items())
    assert {"from a base", "TEST_MODE", "TEST_MODE with LoRA", "a pretrained base"} <= row.others.keys()
    shown = f"{row.default} ({others})"
    assert f"| `MAX_ITERS` | {shown} |" in markdown_table(Settings)


def test_rewriting_keeps_the_rest_of_the_page(tmp_path):
    page = tmp_path / PAGE
    page.parent.mkdir()
    page.write_text("# é\n<!-- settings -->\nold\n<!-- /settings -->\nend\n", "utf-8")
    rewrite(tmp_path, Settings)
    text = page.read_text("utf-8")
    assert text == f"# é\n<!-- settings -->\n{markdown_table(Settings)}\n<!-- /settings -->\nend\n"
    rewrite(tmp_path, Settings)
    assert page.read_text("utf-8") == text
    page.write_text("no markers")
    with pytest.raises(UserError, match="<!-- settings -->"):
        rewrite(tmp_path, Settings)


def test_only_config_reads_the_environment_and_settings_start_without_torch():
    for path in (ROOT / "runtime").glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert path.name == "config.py" or not names & {"environ", "getenv"}, path.name
    code = "import sys, runtime.settings.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
