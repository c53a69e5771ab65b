"""generate.py with adapters: one, several, by strength, none, and one of its own for each prompt of a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import run as run_process

import generate
from jobs.training import train as training
from runtime.processes.command import run_command
from runtime.progress import Patience
from runtime.settings.config import EARLIER, Settings
from runtime.settings.sources import Resolved
from tests.tiny import TINY

FAST = {"test_mode": True, "device": "cpu", "dtype": "fp32", "batch_size": 4, "eval_iters": 2, "max_iters": 30}
TEXT = "To be, or not to be, that is the question.\u2028Whether 'tis nobler in the mind\n"
LENGTH = 30


def train(root: Path, name: str, **changes) -> None:
    values = FAST | {"checkpoints_dir": str(root / "checkpoints"), "dataset": str(root / "text.txt"), "run_name": name}
    training.train(Resolved(Settings.from_dict(values | changes), {}))


def adapt(root: Path, name: str, base: str, seed: int) -> None:
    train(
        root, name, use_lora=True, base=base, seed=seed, lora_rank=2, learning_rate=0.05, dataset=str(root / "t2.txt")
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Adapters `folio` and `milton` of `base`, and `stranger` of `other`, which is the newest run."""
    root = tmp_path_factory.mktemp("generate")
    (root / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    (root / "t2.txt").write_text("Of Mans First Disobedience, and the Fruit\n" * 50)
    train(root, "base", **EARLIER, **TINY)
    train(root, "other", seed=7, **EARLIER, **TINY)
    for name, base, seed in (("folio", "base", 1), ("milton", "base", 2), ("stranger", "other", 3)):
        adapt(root, name, base, seed)
    return root


@pytest.fixture
def command(root: Path, monkeypatch, capsys):
    """generate.py in this process: (status, stdout, stderr)."""
    monkeypatch.chdir(root)
    capsys.readouterr()

    def call(*flags: str) -> tuple[int, str, str]:
        more = () if any(flag.startswith("--max-new-tokens") for flag in flags) else (f"--max-new-tokens={LENGTH}",)
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags, *more, "--dtype=fp32", "--device=cpu"])
        with pytest.raises(SystemExit) as end:
            run_command(generate.main)
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def text(command):
    """What generate.py prints after the prompt `To `."""

    def call(*flags: str) -> str:
        status, out, err = command("--prompt", "To ", *flags)
        assert status == 0, err
        assert out.startswith("To ") and len(out) == 3 + LENGTH + 1
        return out[3:-1]

    return call


def test_adapters_by_name_by_strength_together_and_none(text) -> None:
    base, folio, milton = (text("--run", name) for name in ("base", "folio", "milton"))
    assert len({base, folio, milton}) == 3
    assert text("--adapter", "folio") == text("--adapter", "folio=1") == text("--adapter=folio=1.0") == folio
    assert text("--run", "base", "--adapter", "folio") == text("--run", "milton", "--adapter", "folio") == folio
    assert text("--run", "folio", "--adapter", "none") == text("--adapter", "folio=0", "--adapter=milton=0") == base
    both = text("--adapter", "folio", "--adapter", "milton")
    half = text("--adapter", "folio=0.5", "--adapter=milton=-1")
    assert len({base, folio, milton, both, half}) == 5
    assert text("--adapter", "milton=-1", "--adapter", "folio=.5") == half


def test_without_names_the_newest_run_counts(text) -> None:
    assert text() == text("--run", "stranger") == text("--adapter", "stranger")
    assert text("--adapter", "none") == text("--run", "other") != text()


REFUSED = [
    (
        ("--adapter", "foli"),
        2,
        "there is no adapter 'foli' in checkpoints; did you mean folio? adapters there: milton, stranger",
    ),
    (("--adapter", "base"), 2, "base is no LoRA run; adapters there: folio, milton, stranger"),
    (("--adapter", "folio", "--adapter", "stranger"), 1, "folio of base, stranger of other"),
    (("--run", "other", "--adapter", "folio"), 1, "folio: it was trained on base, and other is another model"),
    (("--run", "stranger", "--adapter", "folio"), 1, "folio: it was trained on base, and stranger is on other"),
    (("--adapter", "folio=half"), 2, "adapter folio=half: what follows '=' must be a number"),
    (("--adapter", "folio=1e999"), 2, "must be a number"),
    (("--adapter", "folio=nan"), 2, "must be a number"),
    (("--adapter", "folio="), 2, "must be a number"),
    (("--adapter", "folio", "--adapter", "folio=0.5"), 2, "adapter folio is given twice"),
    (("--adapter", "none", "--adapter", "folio"), 2, "adapter none stands for the plain base"),
    (("--run", "nobody"), 2, "there is no run 'nobody'"),
    (("--prompt", "a", "--prompts", "p.jsonl"), 2, "--prompt and --prompts are both given"),
    (("--prompts", "nowhere.jsonl"), 2, "nowhere.jsonl: there is no such file or folder"),
]


@pytest.mark.parametrize(("flags", "status", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_one_line(command, flags: tuple[str, ...], status: int, told: str) -> None:
    found, out, err = command(*flags)
    assert (found, out) == (status, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and told in line


LINES = [
    {"prompt": "To be", "adapter": "folio"},
    {"prompt": "To be"},
    {"prompt": "or\u2028not", "adapter": "milton"},
    {"prompt": "", "adapter": "folio=0.5"},
    {"prompt": "To be", "adapter": "none"},
    {"prompt": "that is the question", "adapter": "folio"},
]


def written(root: Path, lines: list[dict]) -> str:
    path = root / "prompts.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8", newline="")
    return str(path)


def test_each_prompt_of_a_file_gets_the_text_that_it_gets_alone(command, root: Path) -> None:
    status, out, err = command("--prompts", written(root, LINES), "--run", "base", "--adapter", "milton")
    assert status == 0, err
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    assert [(line["prompt"], line["adapter"]) for line in found] == [
        (line["prompt"], line.get("adapter", "milton")) for line in LINES
    ]
    for line in found:
        _, alone, _ = command("--run=base", "--adapter", line["adapter"], "--prompt", line["prompt"])
        assert alone == line["prompt"] + line["text"] + "\n"
    assert len({line["text"] for line in found}) == len(LINES)
    _, backwards, _ = command("--prompts", written(root, LINES[::-1]), "--run", "base", "--adapter", "milton")
    assert backwards.split("\n")[-2::-1] == out.split("\n")[:-1]


def test_samples_of_a_prompt_differ_and_the_first_is_the_only_one_of_a_single_run(command, root: Path) -> None:
    _, out, _ = command("--prompts", written(root, LINES[:2]), "--num-samples", "3")
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    assert [line["adapter"] for line in found] == ["folio"] * 3 + ["none"] * 3  # of no run, so of the plain base
    assert len({line["text"] for line in found}) == 6
    _, batch, _ = command("--prompt", "To be", "--prompt", "or", "--num-samples", "3", "--adapter", "folio")
    texts = batch.split("-" * 40 + "\n")
    assert texts[:3] == ["To be" + line["text"] + "\n" for line in found[:3]]
    assert texts[3] == command("--prompt", "or", "--adapter", "folio")[1]


BAD = [
    (b'{"prompt": "a"}\n\n{"prompt": }\n', "line 3: no JSON"),
    (b'{"prompt": "a"}\n{"promt": "b"}\n', "line 2: 'promt' is not a key here"),
    (b'{"adapter": "folio"}', "line 1: prompt is missing"),
    (b'{"prompt": 3}', "line 1: prompt must be text"),
    (b'{"prompt": "a", "adapter": null}', "line 1: adapter must be text, a name or none"),
    (b'{"prompt": "a", "prompt": "b"}', "line 1: no JSON in UTF-8: a key is given twice"),
    (b'{"prompt": "a", "adapter": "folio=x"}', "line 1: adapter folio=x: what follows '='"),
    (b'["a"]', "line 1: must be an object"),
    (b'{"prompt": "\xff"}', "line 1: no JSON in UTF-8"),
    (b"[" * 100_000, "line 1: no JSON"),
    (b'{"prompt": "a"}\n{"prompt": "\xce\xbb"}', "line 2: the tokenizer has no '\u03bb'"),
    (b'{"prompt": "a", "adapter": "nobody"}', "there is no adapter 'nobody' in checkpoints; adapters there: folio"),
    (b'{"prompt": "a", "adapter": "folio"}\n{"prompt": "a", "adapter": "stranger"}', "folio of base, stranger of othe"),
    (b"\n \n", "holds no prompts"),
]


@pytest.mark.parametrize(("data", "told"), BAD, ids=[told for _, told in BAD])
def test_a_bad_line_is_told_with_its_number(command, root: Path, data: bytes, told: str) -> None:
    (root / "prompts.jsonl").write_bytes(data)
    status, out, err = command("--prompts", "prompts.jsonl")
    assert (status > 0, out) == (True, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("From ")]
    assert line.startswith("error: ") and told in line


def test_byte_order_mark_and_windows_line_ends_are_no_mistake(command, root: Path) -> None:
    (root / "prompts.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    status, out, err = command("--prompts", "prompts.jsonl", "--run", "base")
    assert status == 0, err
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "b"]


def test_progress_is_told_on_stderr_of_what_takes_longer_than_two_seconds(capsys) -> None:
    patience = Patience("generate", "token")
    patience(1, 3)
    assert capsys.readouterr() == ("", "")
    patience.began -= 3
    patience(2, 3)
    patience(3, 3)
    out, err = capsys.readouterr()
    assert out == "" and "generate: token 3/3" in err


def test_as_a_process_results_are_on_stdout_and_all_else_on_stderr(root: Path, data_dir: Path) -> None:
    flags = ("--prompts", written(root, LINES[:3]), "--max-new-tokens=5", "--run=base")
    done = run_process(root, data_dir, "generate.py", *flags)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["prompt"] for line in done.stdout.split("\n")[:-1]] == ["To be", "To be", "or\u2028not"]
    assert done.stderr.startswith("From base, on cpu")
