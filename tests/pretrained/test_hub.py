"""Models on a hub, which is a local server: fetched once, then found without it, and what is said where it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import TOKEN, serving
from tiny_models import make, save

ROOT = Path(__file__).resolve().parents[2]


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
    done = subprocess.run(
        [sys.executable, ROOT / command, *words],
        cwd=folder, env=environment | settings, capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
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
