"""Which runs there are, which one is meant, and what is said of them: on runs of every kind that lie in fixtures."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import adapters
import generate
from jobs.adapters import open_adapters
from jobs.base import find_base
from runtime import report
from runtime.checkpoint import all_runs, find_run
from runtime.config import Settings
from runtime.errors import UsageError, run_command

RUNS = Path(__file__).resolve().parent.parent / "fixtures/runs"


@pytest.fixture
def root(tmp_path, monkeypatch, data_dir) -> Path:
    """A folder of runs to change, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    return Path(shutil.copytree(RUNS, "checkpoints"))


def call(monkeypatch, capsys, module, *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(module.main)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def finished_now(run: Path, seconds: int) -> None:
    """Make a run the newest there is: the more seconds, the newer."""
    for name in ("run.json", "result.json"):
        if (run / name).exists():
            os.utime(run / name, (4e9 + seconds, 4e9 + seconds))


# --- which run is meant -------------------------------------------------------------------------------------------


def test_what_was_moved_aside_is_never_picked_but_stays_usable_by_name(root, monkeypatch, capsys):
    finished_now(root / "base", 1)
    shutil.copytree(root / "base", root / "base.old1")
    finished_now(root / "base.old1", 2)
    settings = {"use_lora": True, "checkpoints_dir": str(root)}
    assert find_base(Settings.from_dict(settings)).name == "base"
    assert find_base(Settings.from_dict(settings | {"base": "base.old1"})).name == "base.old1"
    assert "From base, on" in call(monkeypatch, capsys, generate, "--max-new-tokens", "3")[2]
    named = call(monkeypatch, capsys, generate, "--run", "base.old1", "--max-new-tokens", "3")
    assert named[0] == 0 and "From base.old1, on" in named[2]
    assert "base.old1" in call(monkeypatch, capsys, adapters, "list")[1]


def test_drafts_are_no_runs(root):
    before = [run.name for run in all_runs(root)]
    shutil.copytree(root / "lora", root / ".tmp-lora-123")
    assert [run.name for run in all_runs(root)] == before


def test_generate_takes_a_finished_run_before_an_unfinished_one_and_never_one_with_nothing_saved(
    root, monkeypatch, capsys
):
    finished_now(root / "lora", 1)
    finished_now(root / "stopped-base", 2)  # its best weights are there
    (root / "empty").mkdir()
    shutil.copy(root / "base/run.json", root / "empty")
    finished_now(root / "empty", 3)
    few = ("--max-new-tokens", "3")
    assert "From base with lora, on" in call(monkeypatch, capsys, generate, *few)[2]
    for run in all_runs(root):
        if run.name not in ("stopped-base", "empty"):
            shutil.rmtree(run.folder)
    assert "From stopped-base, on" in call(monkeypatch, capsys, generate, *few)[2]
    shutil.rmtree(root / "stopped-base")
    status, _, err = call(monkeypatch, capsys, generate, *few)
    assert status == 1 and "there is no run in checkpoints yet that has saved anything" in err


def test_an_unknown_run_is_told_the_nearest_name_and_a_few_others(root):
    with pytest.raises(UsageError) as error:
        find_run(root, "adalorra")
    told = str(error.value)
    assert "did you mean adalora?" in told and "and 12 more: python adapters.py list" in told and len(told) < 200
    assert told.count(", ") == 3


# --- what is said of runs -----------------------------------------------------------------------------------------


def test_a_run_without_weights_does_not_pass_the_check(root, monkeypatch, capsys):
    for folder in (root / "stopped-base").glob("best-*"):
        shutil.rmtree(folder)
    status, out, _ = call(monkeypatch, capsys, adapters, "check", "stopped-base")
    assert status == 1 and "has no weights" in out


def test_a_prompt_with_foreign_characters_is_told_which_there_are(root, monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys, generate, "--run", "base", "--prompt", "a😀")
    assert (status, out) == (1, "") and "'😀' (U+1F600)" in err and "the characters of ASCII" in err
    assert "DATASET" not in err and "--run" in err


@pytest.mark.parametrize(("variant", "has"), [("lora", True), ("vera", False)])
def test_the_banner_shows_an_alpha_where_it_is_read(variant, has):
    from jobs.job import unread_names

    settings = Settings.from_dict({"use_lora": True, "lora_variant": variant})
    assert ("alpha" in report.banner(settings, unread_names(settings))) is has


def test_runs_that_were_made_tell_of_the_adapter_and_nothing_that_is_not_known(root, monkeypatch, capsys):
    for words in (
        "export lora --out folder",
        "import folder --base base --out in",
        "merge lora --out whole --dataset text.txt",
        "combine lora rslora --out both",
    ):
        shutil.copy(RUNS.parent / "text.txt", ".")
        shutil.copy(RUNS.parent / "other.txt", ".")
        status, _, err = call(monkeypatch, capsys, adapters, *words.split())
        assert status == 0, err
    trained = find_run(root, "lora").about["settings"]
    for name in ("in", "whole", "both"):
        settings = find_run(root, name).about["settings"]
        assert not settings.keys() & {"learning_rate", "max_iters", "n_layer", "seed", "lora_plus_ratio"}
        assert settings["dataset"] == ("" if name == "in" else "other.txt")
    (both,) = open_adapters(root, ("both",))
    for name, rank in (("in", trained["lora_rank"]), ("both", both.adapter.config.rank)):
        settings = find_run(root, name).about["settings"]
        assert (settings["lora_rank"], settings["lora_variant"]) == (rank, "lora")
    assert "lora_rank" not in find_run(root, "whole").about["settings"]
