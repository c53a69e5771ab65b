"""Models on a hub, which is a local server: fetched once, then found without it, and what is said where it fails."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import TOKEN, serving
from tiny_models import make, save

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
SPLITS = (
    "data/train_sft-00000-of-00002.jsonl",
    "data/train_sft-00001-of-00002-a09b74b3ef9c3b56.jsonl",
    "data/train_gen.jsonl",
    "data/test_sft.jsonl",
    "main/train.jsonl",
    "main/test.jsonl",
    "sampled/0.jsonl",
    "sampled/1.jsonl",
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    save(make("llama"), root / "Owner" / "tiny")
    (root / "Owner" / "tiny" / "pytorch_model.bin").write_bytes(b"never fetched")
    save(make("llama"), root / "Owner" / "gated")
    (root / "Owner" / "gated" / ".gated").touch()
    (root / "Owner" / "pairs").mkdir()
    (root / "Owner" / "pairs" / "README.md").write_text("never fetched")
    rows = "".join(json.dumps({"prompt": f"the {i}", "completion": " cat"}) + "\n" for i in range(30))
    (root / "Owner" / "pairs" / "train.jsonl").write_text(rows)
    for path in SPLITS:
        (root / "Owner" / "splits" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "Owner" / "splits" / path).write_text(rows.replace("the", path[5:9]))
    with serving(root) as address:
        yield address


def run(folder: Path, address: str, command: str, *words: str, **settings: str) -> subprocess.CompletedProcess:
    (folder / "letters.txt").write_text("the cat and the dog sat on the mat\n" * 100)
    environment = {name: os.environ[name] for name in ("PATH", "TMPDIR", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HOME": str(folder),
    }
    done = warm.run([ROOT / command, *words], folder, environment | settings)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_base_is_fetched_once_and_its_adapter_finds_it_again_offline(hub: str, tmp_path: Path) -> None:
    words = ("--test-mode", "--use-lora", "--base", "Owner/tiny", "--dataset", "letters.txt", "--block-size", "16")
    done = run(tmp_path, hub, "training.py", *words, "--run-name", "lora", "--max-iters", "2")
    assert done.returncode == 0, done.stderr
    assert "Fetching Owner/tiny from the Hugging Face hub" in done.stderr
    assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))
    about = json.loads((tmp_path / "checkpoints/lora/run.json").read_bytes())
    assert about["base"]["hub"] == "Owner/tiny"
    config = json.loads((tmp_path / "checkpoints/lora/adapter/adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "Owner/tiny"
    for settings in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = run(tmp_path, hub, "generate.py", "--run", "lora", "--max-new-tokens", "3", **settings)
        assert done.returncode == 0, done.stderr
        assert "Fetching" not in done.stderr


def test_a_dry_run_fetches_the_config_only_and_a_run_the_rest(hub: str, tmp_path: Path) -> None:
    words = ("--test-mode", "--use-lora", "--base", "Owner/tiny", "--dataset", "letters.txt", "--block-size", "16")
    done = run(tmp_path, hub, "training.py", "--dry-run", *words)
    assert done.returncode == 0 and "Fetching config.json of Owner/tiny from the Hugging Face hub" in done.stderr
    there = [path.name for path in (tmp_path / "hf").rglob("*") if "snapshots" in path.parts and path.is_file()]
    assert there == ["config.json"] and not (tmp_path / "checkpoints").exists()
    done = run(tmp_path, hub, "training.py", "--dry-run", *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "Fetching" not in done.stderr
    done = run(tmp_path, hub, "training.py", *words, HF_HUB_OFFLINE="1")  # what is there does not pass for the whole
    assert "error: Owner/tiny is not in the cache, and the hub cannot be reached" in done.stderr
    done = run(tmp_path, hub, "training.py", *words, "--max-iters", "2")
    assert done.returncode == 0 and "Fetching Owner/tiny from the Hugging Face hub" in done.stderr


def test_records_are_fetched_once(hub: str, tmp_path: Path) -> None:
    words = ("--test-mode", "--use-lora", "--base", "Owner/tiny", "--dataset", "Owner/pairs", "--block-size", "16")
    for settings in ({}, {"HF_HUB_OFFLINE": "1", "FRESH": "True"}):
        done = run(tmp_path, hub, "training.py", *words, "--max-iters", "2", **settings)
        assert done.returncode == 0, done.stderr
        assert "Base: tiny, records: pairs" in done.stdout
        assert ("Fetching Owner/pairs from the Hugging Face hub" in done.stderr) == (not settings)
    assert not list((tmp_path / "hf").rglob("README.md"))
    done = run(tmp_path, hub, "training.py", *words[:-3], "Owner/none")
    assert "error: there is no Owner/none on the hub, no file of that name here, or it is private" in done.stderr


def fetched(folder: Path) -> set[str]:
    """The files of the data set with splits that are in the cache."""
    return {path.relative_to(folder / "hf").as_posix().split(f"{'c' * 40}/")[1] for path in in_cache(folder)}


def in_cache(folder: Path) -> list[Path]:
    return [path for path in (folder / "hf").rglob("*.jsonl") if "snapshots" in path.parts]


@pytest.mark.parametrize(
    ("split", "paths", "count"),
    [
        ("train_sft", SPLITS[:2], 60),
        ("test_sft", SPLITS[3:4], 30),
        ("main/test", SPLITS[5:6], 30),
        ("sampled", SPLITS[6:], 60),
        ("sampled/1", SPLITS[7:], 30),
    ],
)
def test_only_the_files_of_the_split_that_is_asked_for_are_fetched(
    split: str, paths: tuple, count: int, hub: str, tmp_path: Path
) -> None:
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run(tmp_path, hub, "dataset.py", "look", f"Owner/splits:{split}", **settings)
        assert done.returncode == 0, done.stderr
        assert f"Owner/splits:{split}: {count} records; " in done.stdout
        assert "of 30 are held out" in done.stdout or count == 60
        assert ("Fetching" in done.stderr) == (not settings)
    assert fetched(tmp_path) == set(paths)


def test_a_split_is_trained_on_with_records_of_it_held_out(hub: str, tmp_path: Path) -> None:
    words = ("--test-mode", "--use-lora", "--base", "Owner/tiny", "--block-size", "16", "--max-iters", "2")
    done = run(tmp_path, hub, "training.py", *words, "--dataset", "Owner/splits:test_sft")
    assert done.returncode == 0, done.stderr
    assert "records: splits-test-sft" in done.stdout
    assert fetched(tmp_path) == {SPLITS[3]}
    # The other splits are fetched when they are asked for; what is there of one does not pass for the whole.
    done = run(tmp_path, hub, "dataset.py", "look", "Owner/splits", HF_HUB_OFFLINE="1")
    assert "error: Owner/splits is not in the cache, and the hub cannot be reached" in done.stderr
    done = run(tmp_path, hub, "dataset.py", "look", "Owner/splits")
    assert "Owner/splits: 120 records (train 90, test 30)" in done.stdout
    assert fetched(tmp_path) == set(SPLITS)


def test_a_copy_of_which_nobody_knows_whether_it_is_whole_is_completed(hub: str, tmp_path: Path) -> None:
    assert run(tmp_path, hub, "dataset.py", "look", "Owner/splits").returncode == 0
    for path in (*in_cache(tmp_path)[:3], *(tmp_path / "hf").rglob("trees/*")):  # as another program may leave it
        path.unlink()
    done = run(tmp_path, hub, "dataset.py", "look", "Owner/splits")
    assert "Fetching Owner/splits from the Hugging Face hub" in done.stderr
    assert fetched(tmp_path) == set(SPLITS)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        (
            "Owner/splits:train",
            {},
            "Owner/splits has no split 'train'; it has main, main/test, main/train, sampled, sampled/0, sampled/1, "
            "test_sft, train_gen, train_sft",
        ),
        ("Owner/splits:main", {}, "Owner/splits:main has several splits; name one of main/test, main/train"),
        ("Owner/none:train", {}, "there is no Owner/none on the hub, no file of that name here, or it is private"),
        ("Owner/splits:train", {"HF_HUB_OFFLINE": "1"}, "Owner/splits is not in the cache"),
        ("Owner/splits:train", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Owner/splits is not in the cache"),
    ],
)
def test_a_split_that_there_is_not_is_told_in_one_line(
    name: str, settings: dict, told: str, hub: str, tmp_path: Path
) -> None:
    done = run(tmp_path, hub, "dataset.py", "look", name, **settings)
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith(f"error: {told}")
    assert not in_cache(tmp_path)


@pytest.mark.parametrize("place", ["environment", ".env"])
def test_a_gated_model_needs_a_token_which_is_shown_nowhere(place: str, hub: str, tmp_path: Path) -> None:
    words = ("--run", "Owner/gated", "--max-new-tokens", "3")
    done = run(tmp_path, hub, "generate.py", *words)
    assert done.returncode == 1
    assert "Owner/gated is gated: accept its terms on its page on the hub, and set HF_TOKEN" in done.stderr
    if place == ".env":
        (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    done = run(tmp_path, hub, "generate.py", *words, **({"HF_TOKEN": TOKEN} if place == "environment" else {}))
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("Owner/none", {}, "there is no Owner/none on the hub, no run or folder of that name here, or it is private"),
        ("Owner/tiny", {"HF_HUB_OFFLINE": "1"}, "Owner/tiny is not in the cache, and the hub cannot be reached"),
        ("Owner/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Owner/tiny"),
        ("gpt2", {"HF_HUB_OFFLINE": "1"}, "gpt2 is not in the cache, and the hub cannot be reached"),
    ],
)
def test_what_cannot_be_fetched_is_told_in_one_line(
    name: str, settings: dict, told: str, hub: str, tmp_path: Path
) -> None:
    done = run(tmp_path, hub, "generate.py", "--run", name, **settings)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told in error
