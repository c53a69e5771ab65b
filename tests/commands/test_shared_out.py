"""generate.py --prompts and evaluate.py as several processes of torchrun: what one process gives, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import generate
import training
from runtime.errors import UsageError
from runtime.processes import alike
from runtime.processes.command import run_command
from runtime.processes.launch import Launch
from runtime.processes.world import World
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
FAST = {"test_mode": True, "device": "cpu", "dtype": "fp32", "batch_size": 4, "eval_iters": 2, "max_iters": 20}
ON = ("--device=cpu", "--dtype=fp32")


def train(**values) -> None:
    training.train(Resolved(Settings.from_dict(FAST | TINY | {"block_size": 64} | values), {}))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`base`, and `tuned`, its adapter for the records of pairs.jsonl."""
    root = tmp_path_factory.mktemp("shared")
    rows = [{"instruction": f"Who has {n} owls?", "output": f"Anna has {'so ' * (n % 5)}many."} for n in range(80)]
    (root / "text.txt").write_text("Who has them? It is Anna who has so many owls, and 12 cats.\n" * 60)
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(dataset="text.txt", run_name="base")
        train(dataset="pairs.jsonl", run_name="tuned", base="base", use_lora=True, learning_rate=0.02)
    return root


@pytest.fixture
def alone(root: Path, monkeypatch, capsys):
    """What a command prints as one process."""
    monkeypatch.chdir(root)

    def call(command, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *words, *ON])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(command.main)
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        return out

    return call


@pytest.fixture
def two(root: Path):
    """A command as two processes: (stdout, stderr)."""

    def call(command: str, *words: str, succeeds: bool = True) -> tuple[str, str]:
        start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")
        done = subprocess.run(
            [*start, ROOT / command, *words], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, encoding="utf-8", timeout=120,
        )  # fmt: skip
        assert (done.returncode == 0) == succeeds, done.stderr
        return done.stdout, done.stderr

    return call


def test_prompts_of_a_file_are_shared_out_and_printed_in_their_order(root: Path, alone, two) -> None:
    named = ("none", "tuned", "tuned=0.5")
    lines = [{"prompt": f"{'Who ' * (i % 4)}has {i}", "adapter": named[i % 3]} for i in range(9)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--prompts=prompts.jsonl", "--num-samples=2", "--max-new-tokens=20")
    out, err = two("generate.py", *words, *ON)
    assert out == alone(generate, *words) and err.count("From base") == 1
    found = [json.loads(line) for line in out.splitlines()]
    assert [(row["prompt"], row["adapter"]) for row in found[::2]] == [(row["prompt"], row["adapter"]) for row in lines]
    assert len({row["text"] for row in found}) > 9


def test_a_report_of_several_processes_is_that_of_one(root: Path, alone, two) -> None:
    words = ("tuned", "--data=pairs.jsonl", "--limit=70", "--max-new-tokens=12", "--temperature=0.5")
    out, _ = two("evaluate.py", *words, *ON, "--out=many")
    assert out.replace("Files: many", "Files: one") == alone(evaluate, *words, "--out=one")
    one, many = ({path.name: path.read_bytes() for path in (root / name).iterdir()} for name in ("one", "many"))
    assert one == many and {"answers.jsonl", "report.json", "report.md"} < one.keys()


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (
            "generate.py",
            ("--run", "base", "--prompt", "Who"),
            "error: several processes share out a file of --prompts: ",
        ),
        ("dataset.py", ("lint", "pairs.jsonl"), "works as one process: start it without torchrun"),
    ],
)
def test_what_is_for_one_process_is_refused_in_one_line(two, command: str, words: tuple[str, ...], told: str) -> None:
    out, err = two(command, *words, succeeds=False)
    assert out == "" and err.count(told) == 1 and "Traceback" not in err.partition("elastic")[0]


@pytest.mark.parametrize(("items", "size"), [(0, 2), (1, 2), (5, 2), (5, 4), (8, 4), (3, 4)])
def test_items_are_taken_in_turn_and_come_back_in_order(items: int, size: int, monkeypatch) -> None:
    worlds, everywhere, told = [World(Launch(rank, size)) for rank in range(size)], [], []
    monkeypatch.setattr(World, "gather", lambda self, made: everywhere.append(made) or [[None] * items] * size)
    for world in worlds:
        world.shared_out(range(items), lambda item, step: item**2, lambda *done: told.append(done))
    assert max(map(len, everywhere)) - min(map(len, everywhere)) <= 1 and len(told) == items
    monkeypatch.setattr(World, "gather", lambda self, made: everywhere)
    assert worlds[-1].shared_out(range(items), lambda item, step: item**2) == [i**2 for i in range(items)]


def test_processes_that_have_read_other_files_are_told(monkeypatch) -> None:
    monkeypatch.setattr(World, "gather", lambda self, values: [values, values | {"prompts": "0123456789ab"}])
    monkeypatch.setattr(alike, "world", lambda: World(Launch(0, 2)))
    with pytest.raises(
        UsageError, match="processes 0 and 1 must have the same prompts, and have [0-9a-f]{12} and 01234"
    ):
        alike.check_read_alike(prompts=[[1, 2]], base="f")
