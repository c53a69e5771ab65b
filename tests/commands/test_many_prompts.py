"""generate.py --prompts: lengths of their own, --out, what a kill leaves, and the strategies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import filelock
import pytest
import torch

import generate
from data.jsonlines import read_json_lines
from jobs.generating.load import load
from jobs.generating.results import ResultsFile
from jobs.training import train as training
from models.generation.beams import beam_search
from models.generation.sampling import window_start
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
ON = ("--device=cpu", "--dtype=fp32")
SLOW = "import os, pathlib; pathlib.Path(f'{os.getpid()}.pid').touch()\n"
SLOW += "import time; import models.transformer as t; old = t.Transformer.forward\n"
SLOW += "def slow(*a, **k): time.sleep(0.01); return old(*a, **k)\n"
SLOW += "t.Transformer.forward = slow\n"
SLOW += "import generate; from runtime.processes.command import run_command; run_command(generate.main, many=True)"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run, `base`, and 30 prompts for it."""
    root = tmp_path_factory.mktemp("many")
    (root / "text.txt").write_text("Who has them? It is Anna who has so many owls, and 12 cats.\n" * 60)
    fast = {"test_mode": True, "device": "cpu", "dtype": "fp32", "batch_size": 4, "eval_iters": 2, "max_iters": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        training.train(Resolved(Settings.from_dict(fast | TINY | {"dataset": "text.txt", "run_name": "base"}), {}))
    lines = [{"prompt": f"{'Who ' * (i % 4)}has {i}", "max_new_tokens": 3 + 7 * i % 20} for i in range(30)]
    del lines[7]["max_new_tokens"]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def command(root: Path, monkeypatch, capsys):
    """generate.py in this process: (status, stdout, stderr)."""
    monkeypatch.chdir(root)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *words, *ON])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(generate.main)
        return end.value.code, *capsys.readouterr()

    return call


def rows(path: Path) -> list[dict]:
    return [value for _, value in read_json_lines(path)]


def test_each_line_has_the_length_that_it_asks_for(command, root: Path) -> None:
    status, out, err = command("--prompts=prompts.jsonl", "--max-new-tokens=11")
    assert status == 0, err
    asked, found = rows(root / "prompts.jsonl"), [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in found] == [line["prompt"] for line in asked]
    assert [len(line["text"]) for line in found] == [line.get("max_new_tokens", 11) for line in asked]
    for line in found[6:9]:
        alone = command("--prompt", line["prompt"], f"--max-new-tokens={len(line['text'])}")
        assert alone[1] == line["prompt"] + line["text"] + "\n"


def test_out_is_what_would_be_printed_and_is_never_overwritten(command, root: Path) -> None:
    words = ("--prompts=prompts.jsonl", "--stop=o", "--num-samples=2")
    out, path = command(*words)[1], root / "new" / "all.jsonl"
    status, printed, err = command(*words, f"--out={path}")
    assert (status, printed) == (0, "") and f"Written to {path}" in err
    assert path.read_text() == out and list(path.parent.iterdir()) == [path]
    assert command(*words, f"--out={path}")[0] == 2 and path.read_text() == out
    assert "--prompts" in command("--prompt=a", "--out=b.jsonl")[2]


def killed(root: Path, words: tuple[str, ...], out: Path, lines: int, processes: int = 1) -> None:
    """Start the command, slowed down, and kill it with SIGKILL when so many lines are there."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--")
    start = start if processes > 1 else (sys.executable,)
    script = root / "slow.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SLOW}")
    process = subprocess.Popen(
        [*start, str(script), *words, *ON], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while sum(len(path.read_bytes().splitlines()) - 1 for path in out.parent.glob(f"{out.name}.partial*")) < lines:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        for path in root.glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(path.stem), signal.SIGKILL)
            path.unlink()
        with filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=10):  # free as soon as the process is gone
            pass


def test_after_a_kill_nothing_is_done_twice_and_nothing_is_lost(command, root: Path, monkeypatch) -> None:
    words = ("--prompts=prompts.jsonl", "--out=killed.jsonl", "--seed=3")
    path, part = root / "killed.jsonl", root / "killed.jsonl.partial"
    killed(root, words, path, 8)
    assert not path.exists()
    with part.open("a") as file:
        file.write('{"number": 30, "prom')  # a line that was cut short
    there = [line["number"] for line in rows_of_part(part)]
    assert 8 <= len(there) < 30
    status, _, err = command(*words, "--temperature=0.5")
    assert (status, "with other prompts or settings" in err) == (1, True)
    added: list[int] = []
    real = ResultsFile.add
    monkeypatch.setattr(ResultsFile, "add", lambda self, n, text: (added.append(n + 1), real(self, n, text))[1])
    assert command(*words)[0] == 0
    assert sorted(there + added) == list(range(1, 31))
    assert path.read_text() == command(*words[:1], *words[2:])[1]
    assert not list(root.glob("*killed*.partial*")) and not list(root.glob("*.lock"))


def rows_of_part(path: Path) -> list[dict]:
    """The whole lines of a part, without its first."""
    return [json.loads(line) for line in path.read_text().split("\n")[1:-1]]


def test_two_processes_write_what_one_does_and_go_on_as_one(command, root: Path) -> None:
    words = ("--prompts=prompts.jsonl", "--out=two.jsonl", "--best-of=2")
    killed(root, words, root / "two.jsonl", 9, processes=2)
    parts = [rows_of_part(root / f"two.jsonl.partial{end}") for end in ("", ".1")]
    assert all(parts)
    status, _, err = command(*words)
    assert status == 0, err
    assert (root / "two.jsonl").read_text() == command(words[0], words[2])[1]
    assert not list(root.glob("two.jsonl.partial*"))


def test_best_of_is_the_likeliest_of_the_samples(command, root: Path) -> None:
    model, tokenizer = load("base", root / "checkpoints")
    words, chosen = ("--prompts=prompts.jsonl", "--max-new-tokens=11"), set()
    for seed in ("--seed=1", "--seed=2", "--seed=3"):
        found, samples = (
            [json.loads(line) for line in command(*words, seed, more)[1].splitlines()]
            for more in ("--best-of=3", "--num-samples=3")
        )
        for i, line in list(enumerate(found))[::3]:
            texts = [sample["text"] for sample in samples[3 * i : 3 * i + 3]]
            means = [likelihood(model, tokenizer.encode(line["prompt"]), tokenizer.encode(text)) for text in texts]
            assert line["text"] == texts[means.index(max(means))]
            chosen.add(means.index(max(means)))
    assert len(found) == 30 and len(chosen) > 1


@torch.no_grad()
def likelihood(model, prompt: list[int], tokens: list[int]) -> float:
    """The mean of the logarithms of the tokens' probabilities, by passes without a cache."""
    text, found = list(prompt), []
    for token in tokens:
        window = text[window_start(len(text), model.config.max_positions) :]
        found.append(float(model(torch.tensor([window]))[0][0, -1].log_softmax(-1)[token]))
        text.append(token)
    return sum(found) / len(found)


def test_beams_by_the_command(command, root: Path) -> None:
    model, tokenizer = load("base", root / "checkpoints")
    expected = beam_search(model, tokenizer.encode("Who"), 3, 12)
    assert command("--prompt=Who", "--beams=3", "--max-new-tokens=12")[1] == f"Who{tokenizer.decode(expected.tokens)}\n"
    _, out, _ = command("--prompts=prompts.jsonl", "--beams=2")
    assert [len(json.loads(line)["text"]) for line in out.splitlines()][:3] == [3, 10, 17]
    for more in ("--temperature=1", "--best-of=2", "--num-samples=2", "--chat"):
        status, out, err = command("--beams=2", more)
        assert (status, out) == (2, "") and "--beams" in err


@pytest.mark.parametrize("count", ["0", "-1", "true", '"7"', "1.5", "null"])
def test_a_bad_length_is_told_with_its_line(command, root: Path, count: str) -> None:
    (root / "bad.jsonl").write_text(f'{{"prompt": "a"}}\n{{"prompt": "a", "max_new_tokens": {count}}}\n')
    status, out, err = command("--prompts=bad.jsonl")
    assert (status, out) == (1, "") and "line 2: max_new_tokens must be a whole number, at least 1" in err
