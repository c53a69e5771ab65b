"""Which runs there are, which one is meant, and what is said of them: on runs of every kind that lie in fixtures."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import adapters
import export
import generate
import training
from data.tokenizers import load_tokenizer
from jobs.adapting.adapted import open_adapters
from jobs.runs.base import find_base
from runtime import report
from runtime.errors import UsageError
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.storage.encoding import read_sealed_json, to_sealed_json
from runtime.storage.runs import RunLock, all_runs, find_run

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
    assert (
        "did you mean adalora?" in told
        and "and 12 more: " in told
        and told.count("\n") == 0
        and "adapters.py list" in told
    )
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
    from jobs.runs.job import unread_names

    settings = Settings.from_dict({"use_lora": True, "lora_variant": variant})
    assert ("alpha" in report.banner(settings, unread_names(settings))) is has


def test_runs_that_were_made_tell_of_the_adapter_and_nothing_that_is_not_known(root, monkeypatch, capsys):
    for command, words in (
        (export, "lora --to peft --out folder"),
        (adapters, "import folder --base base --out in"),
        (adapters, "merge lora --out whole --dataset text.txt"),
        (adapters, "combine lora rslora --out both"),
    ):
        shutil.copy(RUNS.parent / "text.txt", ".")
        shutil.copy(RUNS.parent / "other.txt", ".")
        status, _, err = call(monkeypatch, capsys, command, *words.split())
        assert status == 0, err
    trained = find_run(root, "lora").metadata["settings"]
    for name in ("in", "whole", "both"):
        settings = find_run(root, name).metadata["settings"]
        assert not settings.keys() & {"learning_rate", "max_iters", "n_layer", "seed", "lora_plus_ratio"}
        assert settings["dataset"] == ("" if name == "in" else "other.txt")
    (both,) = open_adapters(root, ("both",))
    for name, rank in (("in", trained["lora_rank"]), ("both", both.adapter.config.rank)):
        settings = find_run(root, name).metadata["settings"]
        assert (settings["lora_rank"], settings["lora_variant"]) == (rank, "lora")
    assert "lora_rank" not in find_run(root, "whole").metadata["settings"]


def test_the_list_fits_and_compares_losses_of_different_tokenizers(root, monkeypatch, capsys):
    """What a run says of bits a character is shown; with characters as tokens they follow from the loss."""
    path = root / "base-bpe/result.json"
    told = read_sealed_json(path.read_bytes(), str(path)) | {"bits_per_character": 4.25}
    path.write_bytes(to_sealed_json({key: value for key, value in told.items() if key != "sha256"}))
    for name in ("lora", "base"):
        (root / name).rename(root / f"{name}-shakespeare-r16")
    out = call(monkeypatch, capsys, adapters, "list")[1]
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert max(map(len, out.splitlines())) <= 100 and len(rows) == 1 + len(list(root.iterdir()))
    assert re.search(r"^base-bpe +base +text.txt +bpe +20 +5.0031 +4.2500 +2", rows["base-bpe"])
    assert re.search(r"^  lora-shakespeare-r16 +lora 2 +all +other.txt +char +20 +3.2209 +4.6467 +2", out, re.M)
    assert re.search(r"^  lora-bpe +lora 2 +minimal +other.txt +bpe +20 +4.9686 +2", out, re.M)


def test_a_finished_run_tells_bits_per_character_whatever_its_tokens_are(tmp_path, monkeypatch, capsys, data_dir):
    monkeypatch.chdir(tmp_path)
    text = (RUNS.parent / "text.txt").read_text()
    Path("text.txt").write_text(text)
    flags = "--dataset text.txt --tokenizer bpe --vocab-size 280 --n-layer 1 --n-head 2 --n-embd 16 --block-size 16"
    more = f"--max-iters 2 --warmup-iters 0 --eval-iters 1 --run-name small --data-dir {data_dir}"
    status, out, err = call(monkeypatch, capsys, training, *flags.split(), *more.split())
    assert status == 0, err
    run = find_run(Path("checkpoints"), "small")
    tokenizer = load_tokenizer((run.artifact / "tokenizer.json").read_bytes())
    held_out = text[len(text) * 9 // 10 :]
    tokens, bits = len(tokenizer.encode(held_out)), run.result["bits_per_character"]
    assert bits == pytest.approx(run.result["val_loss"] * math.log2(math.e) * tokens / len(held_out), rel=1e-3)
    assert f"Bits per character of it: {bits:.4f}" in out


def test_a_run_that_has_saved_nothing_is_listed_as_such(root, monkeypatch, capsys):
    shutil.rmtree(root / "stopped-adalora/best-000010")
    out = call(monkeypatch, capsys, adapters, "list")[1]
    assert re.search(r"^ *stopped-adalora +lora +nothing saved$", out, re.M)
    assert max(map(len, out.splitlines())) <= 100


def test_adapters_without_their_base_are_listed_as_such(root, monkeypatch, capsys):
    shutil.rmtree(root / "base-bias")
    out = call(monkeypatch, capsys, adapters, "list")[1]
    assert re.search(r"^\(missing base: base-bias\)\n  lora-bias ", out, re.M) and "missing base: base)" not in out
    (root / "base").rename(root / "renamed")
    path = root / "lora-bias/run.json"
    about = read_sealed_json(path.read_bytes(), str(path))
    about["base"]["path"] = str(RUNS / "base-bias")
    path.write_bytes(to_sealed_json({key: value for key, value in about.items() if key != "sha256"}))
    assert "missing base" not in call(monkeypatch, capsys, adapters, "list")[1]
    out = call(monkeypatch, capsys, adapters, "list")[1]
    assert "missing base: base)" not in out and re.search(r"^renamed .*\n(  .*\n)*  adalora ", out, re.M)


def test_check_finds_a_base_that_was_renamed(root, monkeypatch, capsys):
    (root / "base").rename(root / "renamed")
    status, out, err = call(monkeypatch, capsys, adapters, "check", "lora")
    assert status == 0 and "good" in out and "its base is not here" not in err
    shutil.rmtree(root / "renamed")
    shutil.rmtree(root / "stopped-base")
    assert "its base is not here" in call(monkeypatch, capsys, adapters, "check", "lora")[2]


def test_remove_asks_and_tells_what_would_lose_its_base(root, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    status, out, err = call(monkeypatch, capsys, adapters, "remove", "base-bias", "lora-bpe")
    assert (status, out) == (2, "") and "--yes; it removes" in err and "without a base: lora-bias" in err
    assert "did you mean base?" in call(monkeypatch, capsys, adapters, "remove", "bse", "--yes")[2]
    with RunLock(root / "base"):
        status, _, err = call(monkeypatch, capsys, adapters, "remove", "lora-bias", "base", "--yes")
        assert status == 1 and "run base is being trained by process" in err
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"} == before
    status, out, _ = call(monkeypatch, capsys, adapters, "remove", "base-bias", "lora-bias", "lora-bpe", "--yes")
    assert status == 0 and "base-bias" in out and "without a base" not in out
    left = {path.name for path in root.iterdir()}
    assert left == {path.name for path in RUNS.iterdir()} - {"base-bias", "lora-bias", "lora-bpe"}
