"""The commands on records, run as processes: a base of ours and a pretrained one are tuned, asked, and stop."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from data.chat import GUIDE
from runtime.storage.runs import open_run
from tests import warm
from tests.pretrained.tiny_chats import CHATML
from tests.pretrained.tiny_models import make, save

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS", "XDG_CACHE_HOME")
FAST = {"DEVICE": "cpu", "DATA_DIR": "cache", "BATCH_SIZE": "8", "EVAL_INTERVAL": "20", "DTYPE": "fp32"}
WORDS = ("cat", "dog", "cow", "owl", "bee", "hen", "pig", "ant", "fox", "emu")
ANSWER = "It sat on the mat."


def run(folder: Path, command: str, *words: str, typed: str = "", **settings: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key in KEPT} | {"HF_HUB_OFFLINE": "1"}
    return warm.run([ROOT / command, *words], folder, environment | settings, typed)


def good(*args: str, **settings: str) -> str:
    done = run(*args, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a base of ours on characters, a pretrained one, and records that all have one answer."""
    root = tmp_path_factory.mktemp("tuning")
    rows = [{"instruction": "Where?", "input": f"the {a} and the {b}", "output": ANSWER} for a in WORDS for b in WORDS]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "letters.txt").write_text("### Where? ### It sat on the mat.\n### the cat and the dog\n" * 300)
    good(root, "training.py", "--test-mode", DATASET="letters.txt", MAX_ITERS="150", BLOCK_SIZE="128", **FAST)
    save(make("llama", noise=0.02), root / "theirs")
    (root / "theirs" / "chat_template.jinja").write_text(CHATML)
    return root


@pytest.fixture(scope="module")
def tuned(made: Path) -> Path:
    told = good(
        made, "training.py", USE_LORA="True", TEST_MODE="True", DATASET="pairs.jsonl", RUN_NAME="tuned",
        MAX_ITERS="200", LEARNING_RATE="1e-2", PACKING="True", LORA_RANK="8", **FAST,
    )  # fmt: skip
    assert "Base: test-base-letters, records: pairs" in told
    assert f"Wanted: | {ANSWER}" in told
    assert "are, word for word, what was learned for another prompt" in told
    return made


def test_a_tuned_base_of_ours_answers_and_stops(tuned: Path) -> None:
    asked = ("--instruction", "Where?", "--input", "the ant and the emu", "--max-new-tokens", "60")
    assert run(tuned, "generate.py", "--run", "tuned", *asked).stdout == f"{ANSWER}\n"
    assert run(tuned, "generate.py", "--run", "tuned", *asked, "--num-samples", "2").stdout.count(ANSWER) == 2
    plain = run(tuned, "generate.py", "--run", "tuned", "--adapter", "none", *asked).stdout
    assert plain.strip() not in ("", ANSWER)
    chat = run(tuned, "generate.py", "--run", "tuned", "--chat", "--max-new-tokens", "30", typed="Where?\n")
    assert chat.returncode == 0
    assert chat.stdout.startswith("It ")
    lines = tuned / "prompts.jsonl"
    lines.write_text(json.dumps({"messages": [{"role": "user", "content": "Where?"}], "adapter": "tuned"}))
    assert json.loads(run(tuned, "generate.py", "--prompts", str(lines), "--max-new-tokens", "40").stdout)["text"]


def test_the_template_travels_with_the_run_and_the_adapter(tuned: Path) -> None:
    run_ = open_run(tuned / "checkpoints" / "tuned")
    assert run_.metadata["template"] == GUIDE
    assert (run_.artifact / "chat_template.jinja").read_text() == GUIDE
    assert run_.metadata["dataset"]["name"] == "pairs"
    assert run_.result["val_loss"] < 0.1 < run_.result["base_val_loss"]


def test_a_pretrained_base_is_tuned_by_its_own_template_for_three_epochs(made: Path) -> None:
    settings = {"USE_LORA": "True", "BASE": "theirs", "DATASET": "pairs.jsonl", "RUN_NAME": "theirs-tuned"}
    settings |= {"BLOCK_SIZE": "64", "EVAL_ITERS": "2", "LEARNING_RATE": "3e-2", "GRADIENT_ACCUMULATION_STEPS": "2"}
    told = good(made, "training.py", **settings, **FAST)
    assert "EPOCHS=3: 18 steps" in told  # 91 or so of 100, 16 a step
    run_ = open_run(made / "checkpoints" / "theirs-tuned")
    assert run_.metadata["template"] == CHATML
    assert (run_.artifact / "chat_template.jinja").read_text() == CHATML
    assert run_.result["val_loss"] < run_.result["base_val_loss"]
    again = good(made, "training.py", **settings, **FAST)
    assert "finished already" in again
    good(made, "generate.py", "--run", "theirs-tuned", "--instruction", "Where?", "--max-new-tokens", "5")


def test_adapters_measure_on_the_records_and_a_merged_run_is_asked_the_same(tuned: Path) -> None:
    told = good(tuned, "adapters.py", "merge", "tuned", "--out", "merged", DATA_DIR="cache")
    assert "Verified on held-out text of pairs.jsonl" in told
    assert (tuned / "checkpoints/merged/model/chat_template.jinja").read_text() == GUIDE
    asked = ("--instruction", "Where?", "--input", "the ant and the emu", "--max-new-tokens", "60")
    assert run(tuned, "generate.py", "--run", "merged", *asked).stdout == f"{ANSWER}\n"
    told = good(tuned, "adapters.py", "strength", "tuned", "--strengths", "0,1", DATA_DIR="cache", DTYPE="fp32")
    none, whole = (float(line.split()[1]) for line in told.splitlines() if line.split()[:1] in (["0"], ["1"]))
    result = open_run(tuned / "checkpoints" / "tuned").result
    assert (none, whole) == pytest.approx((result["base_val_loss"], result["val_loss"]), abs=1e-3)


def test_compare_takes_records(tuned: Path) -> None:
    told = good(
        tuned, "compare.py", "--base", "test-base-letters", "--test-mode", "--dataset", "pairs.jsonl",
        "--max-iters", "4", "--eval-iters", "1", "--eval-interval", "2", "--device", "cpu", "--data-dir", "cache",
    )  # fmt: skip
    assert "full" in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"BASE": ""}, "DATASET=pairs.jsonl has records, to which a base is adapted: set BASE or USE_LORA"),
        ({"COLUMNS": "output"}, "COLUMNS=output: 'output' is not like instruction=question"),
        ({"COLUMNS": "output=answer"}, "pairs.jsonl line 1: there is no column 'answer', which COLUMNS names; it has"),
        ({"TEMPLATE": "none.jinja"}, "none.jinja"),
        ({"TEMPLATE": "letters.txt"}, "pairs.jsonl line 1: the chat template writes an answer otherwise than after"),
        ({"BLOCK_SIZE": "16"}, "no record of the train split of pairs has an answer within BLOCK_SIZE=16 tokens"),
        ({"DATASET": "none.jsonl"}, "none.jsonl: there is no such file"),
        ({"DATASET": "cache"}, "cache is a folder without a file that ends in .jsonl"),
        ({"EPOCHS": "2", "MAX_ITERS": "5"}, "EPOCHS=2 and MAX_ITERS=5 are both given; leave one out"),
        ({"VAL_SIZE": "0.000001"}, "leaves the validation split without a record"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(settings: dict, told: str, tuned: Path) -> None:
    before = sorted((tuned / "checkpoints").iterdir())
    done = run(
        tuned,
        "training.py",
        **{"DATASET": "pairs.jsonl", "BASE": "test-base-letters", "TEST_MODE": "True"} | FAST | settings,
    )
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert told in error
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert sorted((tuned / "checkpoints").iterdir()) == before
