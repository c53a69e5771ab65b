"""generate.py --prompts and evaluate.py as several processes of torchrun: what one process gives, byte for byte."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import evaluate
import generate
from jobs.training import train as training
from runtime.errors import UsageError
from runtime.processes import alike
from runtime.processes.command import run_command
from runtime.processes.launch import Launch
from runtime.processes.world import World
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from tests.processes.starts import Case, Ended, in_a_row
from tests.tiny import TINY

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


PROMPTS = ("--prompts=prompts.jsonl", "--num-samples=2", "--max-new-tokens=20")
REPORT = ("tuned", "--data=pairs.jsonl", "--limit=70", "--max-new-tokens=12", "--temperature=0.5")
NAMED = ("none", "tuned", "tuned=0.5")
LINES = [{"prompt": f"{'Who ' * (i % 4)}has {i}", "adapter": NAMED[i % 3]} for i in range(9)]
REFUSED = {
    "one prompt": (
        Case(("--run", "base", "--prompt", "Who"), "generate.py"),
        "error: several processes share out a file of --prompts: ",
    ),
    "lint": (Case(("lint", "pairs.jsonl"), "dataset.py"), "works as one process: start it without torchrun"),
}


@pytest.fixture(scope="module")
def two(root: Path) -> dict[str, list[Ended]]:
    """How commands ended as two processes."""
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    shared = {
        "prompts": Case((*PROMPTS, *ON), "generate.py"),
        "report": Case((*REPORT, *ON, "--out=many"), "evaluate.py"),
    }
    return in_a_row(root, 2, shared | {name: case for name, (case, _) in REFUSED.items()})


def printed(ended: list[Ended]) -> str:
    """What the first of several processes, which alone speaks, printed on stdout."""
    first, *others = ended
    assert [process.status for process in ended] == [0] * len(ended), ended
    assert [process.told for process in others] == [""] * len(others)
    return first.out


def test_prompts_of_a_file_are_shared_out_and_printed_in_their_order(two, alone) -> None:
    out = printed(two["prompts"])
    assert out == alone(generate, *PROMPTS) and two["prompts"][0].err.count("From base") == 1
    found = [json.loads(line) for line in out.splitlines()]
    assert [(row["prompt"], row["adapter"]) for row in found[::2]] == [(row["prompt"], row["adapter"]) for row in LINES]
    assert len({row["text"] for row in found}) > 9


def test_a_report_of_several_processes_is_that_of_one(root: Path, two, alone) -> None:
    out = printed(two["report"]).replace("Files: many", "Files: one")
    assert out == alone(evaluate, *REPORT, "--out=one")
    one, many = ({path.name: path.read_bytes() for path in (root / name).iterdir()} for name in ("one", "many"))
    assert one == many and {"answers.jsonl", "report.json", "report.md"} < one.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_for_one_process_is_refused_in_one_line(two, name: str) -> None:
    assert all(process.status != 0 and process.out == "" and "Traceback" not in process.err for process in two[name])
    assert "".join(process.err for process in two[name]).count(REFUSED[name][1]) == 1


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
