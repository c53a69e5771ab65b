"""The commands, run as people run them: as processes, on real corpora, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import NO_TRACEBACK, PYTHON, ROOT, run

from jobs.summaries.text import counted_words


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, data_dir) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder where `USE_LORA=True TEST_MODE=True python training.py` was run on a fresh clone."""
    folder = tmp_path_factory.mktemp("adapted")
    return folder, run(folder, data_dir, "training.py", USE_LORA="True", TEST_MODE="True")


def test_lora_without_a_base_trains_one_first_and_goes_on(adapted):
    folder, done = adapted
    assert done.returncode == 0, done.stderr
    assert "no trained base" in done.stderr
    assert (folder / "checkpoints/test-base-shakespeare/model/model.safetensors").exists()
    assert (folder / "checkpoints/test-lora-folio-r8/adapter/adapter_model.safetensors").exists()
    result = json.loads((folder / "checkpoints/test-lora-folio-r8/result.json").read_bytes())
    assert result["val_loss"] < result["base_val_loss"] - 0.05


def test_what_a_run_prints(adapted):
    out = adapted[1].stdout
    assert "🔧 Using LoRA for efficient fine-tuning\n   LoRA rank: 8, alpha: 16.0, dropout: 0.0\n" in out
    block = out.split("📊 Parameter Statistics:\n")[-1].splitlines()
    count = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in block[:6]}
    parts = ("Trainable (LoRA)", "Trainable (embeddings)", "Frozen (base)")
    total = int(count["Total parameters"].replace(",", ""))
    assert sum(int(count[part].replace(",", "")) for part in parts) == total
    lora, embeddings = (int(count[part].replace(",", "")) for part in parts[:2])
    assert count["LoRA percentage"] == f"{100 * lora / total:.2f}%"
    assert f"Training only {100 * (lora + embeddings) / total:.2f}% of parameters!" in count["💰 Cost savings"]
    for told in (
        "tokens/s",
        "Peak memory",
        "Best validation loss",
        "with the adapter",
        "without it",
        f"Next: {PYTHON}",
    ):
        assert told in out


def test_metrics_are_one_object_a_line(adapted):
    lines = (adapted[0] / "checkpoints/test-lora-folio-r8/metrics.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    assert [line["step"] for line in values if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in values if "val_loss" in line] == [20, 40]


def test_an_identical_finished_run_is_left_alone(adapted, data_dir):
    folder, _ = adapted
    weights = folder / "checkpoints/test-lora-folio-r8/adapter/adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    done = run(folder, data_dir, "training.py", "--use-lora", "--test-mode")
    assert done.returncode == 0 and "finished already" in done.stdout and "--fresh" in done.stdout
    assert weights.stat().st_mtime_ns == before


def test_other_settings_get_a_name_of_their_own_and_fresh_moves_aside(adapted, data_dir):
    folder, _ = adapted
    runs = folder / "checkpoints"
    short = ("--use-lora", "--test-mode", "--max-iters", "2")
    assert run(folder, data_dir, "training.py", *short).returncode == 0
    (named,) = [path for path in runs.glob("test-lora-folio-r8-*") if path.is_dir()]
    assert (named / "adapter").is_dir() and len(named.name) == len("test-lora-folio-r8-") + 6
    done = run(folder, data_dir, "training.py", *short, "--run-name", named.name, "--fresh")
    assert done.returncode == 0 and (runs / f"{named.name}.old1" / "adapter").is_dir() and (named / "adapter").is_dir()


def test_full_fine_tuning_from_a_base(adapted, data_dir):
    folder, _ = adapted
    asked = {"MAX_ITERS": "20", "WARMUP_ITERS": "4", "LR_SCHEDULE": "linear", "MIN_LR": "1e-3", "LEARNING_RATE": "9e-3"}
    done = run(folder, data_dir, "training.py", TEST_MODE="1", BASE="test-base-shakespeare", LOG_INTERVAL="8", **asked)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("test-full-folio: step ")]
    number = r"[\d.,]+"
    for line, step, rate in zip(lines, (8, 16, 20), ("0.0075", "0.0035", "0.0015"), strict=True):
        val = rf", val {number}" if step == 20 else ""
        form = rf"test-full-folio: step {step}/20, loss {number}, lr {rate}, tokens/s {number}{val}, \d+ s left"
        assert re.fullmatch(form, line), line
    about = json.loads((folder / "checkpoints/test-full-folio/run.json").read_bytes())
    assert about["kind"] == "full" and about["base"]["run"] == "test-base-shakespeare"
    assert about["settings"]["dataset"] == "folio"


def test_an_env_file_means_the_same_as_variables_and_flags(tmp_path, adapted, data_dir):
    (tmp_path / ".env").write_text(
        "USE_LORA=True\nTEST_MODE=True\nLORA_RANK=3\nLORA_ALPHA=6\nLORA_DROPOUT=0.1\nMAX_ITERS=1\n"
    )
    done = run(tmp_path, data_dir, "training.py", CHECKPOINTS_DIR=str(adapted[0] / "checkpoints"))
    assert done.returncode == 0, done.stderr
    assert "LoRA rank: 3, alpha: 6.0, dropout: 0.1" in done.stdout and "LORA_RANK=3 (.env)" in done.stderr
    config = json.loads((adapted[0] / "checkpoints/test-lora-folio-r3/adapter/adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6.0, 0.1)


def test_generate_with_and_without_the_adapter(adapted, data_dir):
    folder, _ = adapted
    flags = ("--run", "test-lora-folio-r8", "--prompt", "O ", "--max-new-tokens", "80", "--seed", "3")
    texts = {
        name: run(folder, data_dir, "generate.py", *flags, *more).stdout
        for name, more in {
            "own": (),
            "named": ("--adapter", "test-lora-folio-r8"),
            "none": ("--adapter", "none"),
        }.items()
    }
    assert texts["own"] == texts["named"] != texts["none"]
    assert all(text.startswith("O ") and len(text) == 83 for text in texts.values())


def test_generate_a_batch_of_prompts_of_different_lengths(adapted, data_dir):
    flags = ("--prompt", "Enter Romeo and", "--prompt", "O", "--num-samples", "2", "--max-new-tokens", "20", "--greedy")
    done = run(adapted[0], data_dir, "generate.py", *flags, "--dtype", "fp32", "--run", "test-base-shakespeare")
    first, second, third, fourth = done.stdout.split("-" * 40 + "\n")
    assert first == second and third == fourth and first.startswith("Enter Romeo and") and third.startswith("O")


BAD = [  # status 2: what is asked for cannot be, or is not there; 1: what is there cannot be used
    ("training.py", {"LORA_RNAK": "4"}, (), 2, "did you mean LORA_RANK"),
    ("training.py", {"USE_LORA": "maybe"}, (), 2, "USE_LORA=maybe"),
    ("training.py", {}, ("--use-lorra",), 2, "did you mean --use-lora"),
    ("training.py", {"USE_LORA": "1"}, ("--lora-rank", "0"), 2, "--lora-rank 0"),
    ("training.py", {"USE_LORA": "1"}, ("--lora-targets", "q_porj"), 2, "'q_porj' matches no linear"),
    ("training.py", {"USE_LORA": "1"}, ("--lora-bias", "all"), 2, "no biases to train"),
    ("training.py", {"BASE": "nobody"}, (), 2, "runs there: test-"),
    ("training.py", {"BASE": "test-lora-folio-r8"}, (), 2, "is a LoRA run"),
    ("training.py", {"USE_LORA": "1", "N_LAYER": "3"}, (), 2, "N_LAYER=3 (it has 2)"),
    ("training.py", {"DATASET": "missing.txt"}, (), 2, "missing.txt"),
    ("training.py", {"DATASET": "shakespear"}, (), 2, "shakespeare"),
    ("training.py", {"DATASET": "empty.txt"}, (), 1, "empty"),
    ("training.py", {"DATASET": "latin1.txt"}, (), 1, "UTF-8"),
    ("training.py", {"DATASET": "short.txt"}, (), 1, "BLOCK_SIZE="),
    ("training.py", {"DATASET": "greek.txt", "USE_LORA": "1"}, (), 1, "'λ'"),
    ("training.py", {"TOKENIZER": "gpt2", "TIKTOKEN_CACHE_DIR": ""}, (), 1, "TOKENIZER=bpe"),
    ("generate.py", {}, ("--run", "nobody"), 2, "runs there: test-"),
    ("generate.py", {}, ("--adapter", "nobody"), 2, "nobody"),
    ("generate.py", {}, ("--temperature", "-1"), 2, "--temperature -1"),
    ("generate.py", {}, ("--prompts", "missing.jsonl"), 2, "missing.jsonl"),
    ("generate.py", {}, ("--prompts", "latin1.txt"), 1, "latin1.txt line 1: no JSON"),
    ("compare.py", {"DATASET": "missing.txt"}, (), 2, "missing.txt"),
    ("compare.py", {"DATASET": "latin1.txt"}, (), 1, "UTF-8"),
    ("evaluate.py", {}, ("nobody",), 2, "runs there: test-"),
    ("evaluate.py", {}, ("test-lora-folio-r8", "--data", "missing.jsonl"), 2, "missing.jsonl"),
    ("evaluate.py", {}, ("test-lora-folio-r8", "--data", "checkpoints"), 1, "a folder without a file that ends in"),
    ("evaluate.py", {}, ("test-lora-folio-r8", "--word-list", "missing.txt"), 2, "missing.txt"),
    ("evaluate.py", {}, ("test-lora-folio-r8", "--word-list", "latin1.txt"), 1, "UTF-8"),
    ("adapters.py", {}, ("inspect", "nobody"), 2, "there is no adapter 'nobody'"),
    ("adapters.py", {}, ("strength", "test-lora-folio-r8", "--dataset", "missing.txt"), 2, "missing.txt"),
    ("adapters.py", {}, ("strength", "test-lora-folio-r8", "--dataset", "latin1.txt"), 1, "UTF-8"),
    ("adapters.py", {}, ("check", "missing"), 2, "missing: there is no such file"),
    ("adapters.py", {}, ("check", "checkpoints"), 1, "is no run, adapter or model"),
    ("adapters.py", {}, ("import", "missing", "--base", "b", "--out", "x"), 2, "missing"),
    (
        "adapters.py",
        {},
        ("import", "checkpoints", "--base", "test-base-shakespeare", "--out", "x"),
        1,
        "not an adapter",
    ),
    ("dataset.py", {}, ("lint", "missing.jsonl"), 2, "missing.jsonl"),
    ("dataset.py", {}, ("lint", "checkpoints"), 1, "a folder without a file that ends in"),
    ("export.py", {}, ("nobody", "--out", "x"), 2, "runs there: test-"),
    ("report.py", {}, ("nobody",), 2, "runs there: test-"),
    ("report.py", {}, ("test-lora-folio-r8", "--evaluation", "missing"), 2, "missing"),
    (
        "report.py",
        {},
        ("test-lora-folio-r8", "--evaluation", "checkpoints"),
        1,
        "could not read checkpoints/report.json",
    ),
    ("serve.py", {}, ("--run", "nobody"), 2, "runs there: test-"),
]


def test_bad_input_is_one_line_and_nothing_is_lost(adapted, data_dir):
    """All in one process each of the cheap kind: settings, texts and names are refused before any training."""
    folder, _ = adapted
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin1.txt").write_bytes("déjà vu".encode("latin-1") * 100)
    (folder / "short.txt").write_text("to be or not")
    (folder / "greek.txt").write_text("λόγος " * 100, encoding="utf-8")
    before = sorted(path for path in (folder / "checkpoints").rglob("*"))
    script = (
        "import json, os, runpy, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for command, environ, flags in json.loads(sys.argv[2]):\n"
        "    saved = dict(os.environ); os.environ.update(environ); sys.argv = [command, *flags]\n"
        "    try:\n"
        "        runpy.run_path(os.path.join(sys.path[0], command), run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(f'<end {end.code}>', file=sys.stderr, flush=True)\n"
        "    os.environ.clear(); os.environ.update(saved)\n"
    )
    cases = json.dumps([(command, {"TEST_MODE": "1"} | environ, flags) for command, environ, flags, _, _ in BAD])
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), cases],
        cwd=folder,
        env=os.environ | {"DATA_DIR": str(data_dir), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert NO_TRACEBACK not in done.stderr
    for (command, environ, flags, _, told), text in zip(BAD, done.stderr.split("<end ")[:-1], strict=True):
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and told in errors[0], (command, environ, flags, text)
    statuses = [int(part.split(">")[0]) for part in done.stderr.split("<end ")[1:]]
    assert statuses == [case[3] for case in BAD]
    assert sorted(path for path in (folder / "checkpoints").rglob("*")) == before


def test_an_adapter_for_another_base_and_a_flipped_bit_are_refused(adapted, data_dir):
    folder, _ = adapted
    runs = folder / "checkpoints"
    assert (
        run(folder, data_dir, "training.py", TEST_MODE="1", SEED="7", MAX_ITERS="2", RUN_NAME="other").returncode == 0
    )
    done = run(folder, data_dir, "generate.py", "--run", "other", "--adapter", "test-lora-folio-r8")
    assert done.returncode == 1 and "it was trained on test-base-shakespeare" in done.stderr
    weights = runs / "other/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    done = run(folder, data_dir, "generate.py", "--run", "other")
    assert done.returncode == 1 and "checksum" in done.stderr


def test_more_steps_are_another_run_and_said_to_be(tmp_path, data_dir):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    flags = ("--test-mode", "--dataset", "text.txt", "--n-layer", "1", "--checkpoints-dir", "runs")
    first = run(tmp_path, data_dir, "training.py", *flags, "--max-iters", "10")
    line = next(line for line in first.stdout.splitlines() if line.startswith("➡️  Next: "))
    script = shlex.quote(str(ROOT / "training.py"))
    assert line.endswith(f"{script} --use-lora --base test-base-text --test-mode --checkpoints-dir runs"), (
        "what is to be typed next works here"
    )
    more = run(tmp_path, data_dir, "training.py", *flags, "--max-iters", "20")
    assert "test-base-text was trained with MAX_ITERS=10, " in more.stderr and "begins anew" in more.stderr
    again = next(line for line in more.stderr.splitlines() if "to train its weights further: " in line)
    done = subprocess.run(
        f"{again.partition('further: ')[2].rstrip(')')} --test-mode --max-iters 5",
        shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/test-full-text/model").is_dir()


def test_a_text_with_hardly_a_word_of_its_own_is_not_counted_by_them() -> None:
    sample = {"words": 210, "found": 0, "marked": []}
    told = {"counted": "words that only letters has", "distinct": 3}
    assert counted_words(told, sample) == "There are too few words that only letters has to count them here"
    assert counted_words(told | {"distinct": 400}, sample) == "0 of 210 words (0 %) are words that only letters has"
