"""Command lines beyond plain flags: commands of commands, words without a flag, values that begin with a minus."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hostile_settings import TABLES

import adapters
import dataset
from data.linting.forms import TARGETS
from jobs.adapting import command as adapting
from jobs.exporting import command as exporting
from jobs.looking import command as looking
from lora.variants.registry import VARIANTS
from runtime.errors import UsageError
from runtime.settings.config import Settings
from runtime.settings.fields import Table, setting, settings_of
from runtime.settings.flags import subcommand
from runtime.settings.sources import read_settings

ROOT = Path(__file__).resolve().parents[2]
HERE = {"group": "What", "env": False}


@dataclass(frozen=True, kw_only=True)
class Words(Table):
    """A table with all of it."""

    names: tuple[str, ...] = setting(
        (), "Some names", metavar="NAME", pattern="[a-z]+", allowed="small letters", **HERE
    )
    weights: str = setting("", "Numbers", **HERE)
    out: str = setting("", "A name", required=True, **HERE)
    low: float = setting(0.0, "A number", **HERE)


def read(*words: str):
    return read_settings(Words, words, {}, "no .env", prog="do it", description="Do it.")


def refused(*words: str) -> str:
    with pytest.raises(UsageError) as error:
        read(*words)
    return str(error.value)


def test_words_without_a_flag_stand_before_between_or_after_flags():
    for words in (("a", "b", "--out", "c"), ("--out", "c", "a", "b"), ("--out=c", "a", "b", "--low", "1")):
        assert (read(*words).settings.names, read(*words).settings.out) == (("a", "b"), "c")
    assert read("a", "--out", "c").sources == {"NAMES": "argument", "OUT": "flag --out"}


@pytest.mark.parametrize("text", ["-1,0.5", "-.5", "-1"])
def test_a_value_may_begin_with_a_minus(text):
    assert read("a", "--out", "c", "--weights", text).settings.weights == text
    assert read("a", "--out", "c", "--low", "-1").settings.low == -1.0


def test_what_is_missing_or_wrong_is_told_by_its_name():
    assert refused("--out", "c") == "the following arguments are required: NAME; --help lists all flags"
    assert refused("a") == "the following arguments are required: --out; --help lists all flags"
    assert refused("a", "B", "--out", "c") == "NAMES=a, B (argument): must be small letters"
    assert refused("a", "--out", "c", "b") == "b is one argument too many; --help tells what there may be"
    assert "did you mean --weights?" in refused("a", "--out", "c", "--wieghts", "1")
    assert "did you mean --low?" in refused("a", "--out", "c", "--lwo", "1")
    assert "--help lists them all" in refused("a", "--out", "c", "--loud", "1")


def test_help_shows_the_words_and_what_is_required(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert "usage: do it NAME ... [--setting value ...]" in text and "A name. [required]" in text


def test_the_first_word_says_which_command_is_meant(capsys):
    commands = {"merge": 1, "list": 2}
    assert subcommand(["list", "--help"], commands, "") == "list"
    for words, told in (([], "which command? There are: merge, list"), (["mrge"], "did you mean merge?"),
                        (["--out"], "there is no command '--out'; There are")):  # fmt: skip
        with pytest.raises(UsageError) as error:
            subcommand(words, commands, "")
        assert told in str(error.value)
    with pytest.raises(SystemExit) as end:
        subcommand(["-h"], commands, "\nThe text.\n")
    assert not end.value.code and capsys.readouterr().out == "The text.\n"


WRONG = (  # a way to use each command wrong, and what it says
    ("training.py --lora-rank x", "must be a whole number"),
    ("generate.py --input x", "goes with --instruction"),
    ("evaluate.py run --columns x=y", "are those of --data"),
    ("serve.py --prot 8080", "did you mean --port?"),
    ("playground.py --port x", "must be a whole number"),
    ("compare.py --use-lora", "it always compares both"),
    ("compare.py --sweep --widths 30", "is not a multiple of N_HEAD"),
    ("generate.py --prompts nowhere", "nowhere: there is no such file"),
    ("adapters.py mrge", "did you mean merge?"),
    ("adapters.py merge run", "required: --out"),
    ("adapters.py combine a b --weights 1 --out c", "one for each is needed"),
    ("adapters.py inspect run --out export.py", "nothing is overwritten"),
    ("dataset.py split", "required: --out, FILE"),
    ("dataset.py convert a --out b.txt", "it must end in .jsonl"),
    ("export.py run --out folder --to onnx --outtype f16", "is for --to hf and gguf"),
    ("export.py run --out folder --to gguf", "ends in .gguf"),
    ("tune.py --ranks 4 --lora-rank 4", "leave out one"),
    ("report.py a a", "a run is named twice"),
)


def imported(line: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """A command of ours in a process of its own, and the packages that it imports."""
    words = [sys.executable, "-X", "importtime", *line.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    return done, set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("command", [*TABLES, "adapters.py", "dataset.py"])
def test_help_does_not_wait_for_torch(command):
    done, packages = imported(f"{command} --help")
    assert not done.returncode and "argparse" in packages and not packages & {"torch", "numpy"}


@pytest.mark.parametrize(("line", "told"), WRONG)
def test_a_wrong_command_line_is_refused_before_torch_is_imported(line, told):
    done, packages = imported(line)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1]
    assert "argparse" in packages and not packages & {"torch", "numpy"}


def test_every_command_is_used_wrong_above():
    assert {line.split()[0] for line, _ in WRONG} == {command.split()[0] for command in TABLES}


def test_names_that_stand_where_torch_is_not_are_those_of_what_does_the_work():
    """Of commands and formats, and of the kinds of adapters, records and files that flags may name."""
    assert adapting.WORK.keys() == set(adapters.COMMANDS.values())
    assert looking.WORK.keys() == set(dataset.COMMANDS.values())
    choices = {row.name: row.choices for row in settings_of(exporting.Options)}
    assert tuple(exporting.WRITERS) == choices["to"]
    assert tuple(VARIANTS) == {row.name: row.choices for row in settings_of(Settings)}["lora_variant"]
    assert ("keep", *TARGETS) == {row.name: row.choices for row in settings_of(looking.Convert)}["form"]
