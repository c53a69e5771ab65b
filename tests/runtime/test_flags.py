"""Command lines beyond plain flags: commands of commands, words without a flag, values that begin with a minus."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.errors import UsageError
from runtime.settings.fields import Table, setting
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


def test_help_and_wrong_flags_do_not_wait_for_torch():
    code = "import sys, training, generate, evaluate, serve, playground; sys.exit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode
