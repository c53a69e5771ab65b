"""Hostile names: a misspelt setting is refused and the meant one named, and other people's variables are left alone.

SOAK=1 makes a typing error at every place of every name.
"""

from __future__ import annotations

import io
import os
import random
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hostile_settings import TABLES, Given, carried, distinct_rows, outcome, quoted
from hostile_texts import HOSTILE, SOAK, report, tries
from hypothesis import given
from hypothesis import strategies as st

from runtime.settings.config import Settings
from runtime.settings.fields import settings_of
from runtime.settings.sources import Resolved, read_settings
from runtime.settings.spelling import CALLED, near_miss, plain, typing_errors

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = [row.variable for row in settings_of(Settings) if row.env]
DISTINCTIVE = [name for name in VARIABLES if "_" in name]


def typos(names: list[str], alphabet: str) -> list[tuple[str, str]]:
    """Names with one letter dropped, doubled, replaced, or swapped with the next, and the names that are meant."""
    found = [(typo, name) for name in names for typo in dict.fromkeys(misspelt(name, alphabet)) if typo not in names]
    return [(typo, name) for typo, name in found if plain(typo).strip("_") not in CALLED]


def misspelt(name: str, alphabet: str) -> Iterator[str]:
    """A name with one typing error, at every place or at some."""
    drawn = random.Random(name)
    for at in range(0, len(name), 1 if SOAK else 7):
        yield name[:at] + name[at + 1 :]
        yield name[:at] + name[at] + name[at:]
        yield name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :]
        for other in alphabet if SOAK else drawn.choice(alphabet):
            yield name[:at] + other + name[at + 1 :]


def check_named(line: str, told: str, typed: str, meant: str) -> None:
    """The line is `told`, followed by the meant name or another that is as few typing errors away."""
    assert line.startswith(f"{told}; did you mean ") and line.endswith("?"), line
    named = line.removeprefix(f"{told}; did you mean ").removesuffix("?")
    assert named == meant or typing_errors(named, typed) <= typing_errors(meant, typed), line


@pytest.mark.parametrize("source", ["in the environment", "in .env"])
def test_a_misspelt_variable_is_refused_and_the_meant_one_named(source, tmp_path):
    counted, struck = typos(DISTINCTIVE, string.ascii_uppercase), []
    for typed, meant in counted:
        if "LORA" in meant or source == "in .env":
            found = Given(dotenv=f"{typed}=1\n") if source == "in .env" else Given(environ=((typed, "1"),))
            check_named(outcome(Settings, found, tmp_path), f"{typed} ({source}) is not a setting", typed, meant)
        else:
            check_warned(typed, meant, tmp_path)
        struck.append((typed, meant))
    report(f"misspelt {source}", counted, struck)


def check_warned(typed: str, meant: str, folder: Path) -> None:
    """In the environment a name that may be another program's stops nothing; only what is nearly a LoRA name does."""
    names = [row for row in DISTINCTIVE if typing_errors(row, typed) <= typing_errors(meant, typed)]
    hints = [f"(in the environment) is not a setting and is ignored; did you mean {name}?" for name in names]
    assert warned(((typed, "1"),), folder) in [f"{typed} {hint}" for hint in hints]


def warned(environ: tuple[tuple[str, str], ...], folder: Path) -> str:
    """The warning of a command that takes no setting from this environment."""
    with redirect_stderr(io.StringIO()) as stderr:
        found = read_settings(Settings, (), dict(environ), folder / "no .env", prog="x", description="")
    assert found == Resolved(Settings(), {})
    return stderr.getvalue().removeprefix("warning: ").removesuffix("\n")


def test_of_two_names_that_could_be_meant_the_nearer_one_is_named(tmp_path):
    assert "did you mean BATCH_SIZE?" in outcome(Settings, Given(dotenv="BLTCH_SIZE=1"), tmp_path)
    assert "did you mean --n-embd?" in outcome(Settings, Given(("--n-eabd=1",)), tmp_path)


@pytest.mark.parametrize("command", TABLES)
def test_every_command_refuses_what_looks_like_a_variable_of_a_run(command, tmp_path):
    for name in DISTINCTIVE:
        line = outcome(TABLES[command], Given(needed(command), dotenv=f"{name[:-1]}=1"), tmp_path)
        check_named(line, f"{name[:-1]} (in .env) is not a setting", name[:-1], name)


def needed(command: str) -> tuple[str, ...]:
    """The words that a command cannot do without."""
    rows = settings_of(TABLES[command])
    return (*("a" for row in rows if row.metavar), *(f"{row.flag}=a" for row in rows if row.required))


def misspelt_flags() -> Iterator[tuple[str, str, str]]:
    """Each command with misspelt forms of those of its flags that no command before it has."""
    for command, table in TABLES.items():
        names = [row.flag for row in settings_of(table)]
        own = [row.flag for owner, row in distinct_rows() if owner is table and not row.metavar]
        for typed, meant in typos([flag[2:] for flag in own if len(flag) > 7], string.ascii_lowercase):
            if f"--{typed}" not in names:
                yield command, f"--{typed}", f"--{meant}"


def test_a_misspelt_flag_is_refused_and_a_flag_that_is_as_near_is_named(tmp_path):
    counted, struck = list(misspelt_flags()), []
    for command, typed, meant in counted:
        line = outcome(TABLES[command], Given((*needed(command), f"{typed}=1")), tmp_path)
        check_named(line, f"{typed}=1 is not a flag", "--" + typed.strip("-"), meant)
        struck.append((command, typed, meant))
    report("misspelt flags", counted, struck)


# --- what belongs to others -----------------------------------------------------------------------------------------

# fmt: off
STRANGERS = (
    "PATH", "HOME", "LANG", "LC_ALL", "TERM", "SHELL", "USER", "TMPDIR", "EDITOR", "PS1", "LINES", "DISPLAY",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_HOME",
    "PYTHONPATH", "PYTHONHASHSEED", "VIRTUAL_ENV", "HF_TOKEN", "WANDB_API_KEY", "AWS_REGION", "KUBERNETES_PORT",
    "http_proxy", "ProgramFiles(x86)", "BASH_FUNC_x%%", "_", "MAX_JOBS", "DATA_ROOT", "MODEL", "LORA",
)
# fmt: on


def is_far(name: str) -> bool:
    """Whether a name is no other name of a setting and more than two typing errors away from each, however written."""
    plain = name.upper().translate(str.maketrans("-. ", "___"))
    bare = plain.replace("_", "")
    if plain.strip("_") in CALLED or plain.startswith("LORA_"):
        return False
    return all(typing_errors(plain, other) > 2 and bare != other.replace("_", "") for other in VARIABLES)


@tries(80, 2000)
@given(
    name=st.sampled_from(STRANGERS) | st.text(string.ascii_letters + string.digits + "_", min_size=1).filter(is_far),
    text=st.sampled_from(HOSTILE) | st.text(max_size=20),
)
def test_whatever_others_put_into_their_variables_is_left_alone(name, text, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    for found in (
        Given(environ=((name, carried("environment", text)),)),
        Given(environ=(("DOLLAR", "$"),), dotenv=f"{name}={quoted(carried('.env', text))}\n"),
        Given(dotenv=f"{name}=${{NOWHERE}}{name}\n"),
    ):
        assert outcome(Settings, found, folder) == Resolved(Settings(), {}), name


@pytest.mark.parametrize("command", TABLES)
def test_a_flag_that_is_no_variable_leaves_variables_of_its_name_to_others(command, tmp_path):
    others = {row.variable for row in settings_of(TABLES[command]) if not row.env}
    others -= {*VARIABLES, *CALLED}
    others = {name for name in others if not near_miss(name, VARIABLES)}  # those are taken for misspelt settings
    plain = outcome(TABLES[command], Given(needed(command)), tmp_path)
    environ = tuple((name, text) for name, text in zip(sorted(others), HOSTILE, strict=False))
    lines = "".join(f"{name}=${{NOWHERE}} 1e999\n" for name in sorted(others))
    assert outcome(TABLES[command], Given(needed(command), environ, lines), tmp_path) == plain


# --- as processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "environ", "dotenv", "told"),
    [
        (["training.py", "--lora-rank=--"], {}, "", "--lora-rank -- (flag): must be a whole number "),
        (["training.py"], {"N_HEAD": b"\xff\x1b[2J" + b"9" * 5000}, "", "N_HEAD='\\udcff\\x1b[2J999"),
        (["adapters.py", "list"], {"SEED": b"1"}, "LORA_TARGTES=all\nSEED=${HOME}\n", "did you mean LORA_TARGETS?"),
    ],
)
def test_a_command_ends_with_one_line_and_status_2_and_leaves_nothing_behind(command, environ, dotenv, told, tmp_path):
    (tmp_path / ".env").write_text(dotenv)
    ended = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        cwd=tmp_path,
        env={os.fsencode(name): os.fsencode(value) for name, value in (dict(os.environ) | environ).items()},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and told in ended.stderr
    assert ended.stderr.endswith("\n") and ended.stderr[:-1].isprintable(), "one line, and no traceback"
    assert [path.name for path in tmp_path.iterdir()] == [".env"]
