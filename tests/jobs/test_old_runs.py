"""Runs that an earlier version of this project made: they load, compute what they computed, and go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.adapting.adapted import Base, open_adapters
from runtime.storage.runs import open_run
from tests.commands.command_line import run as run_command

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RUNS = FIXTURES / "runs"
LOGITS = load_file(FIXTURES / "logits.safetensors")
IDX = torch.arange(32).view(2, 16) * 7 % 90
SETTINGS = "--dtype fp32 --batch-size 4 --max-iters 20 --warmup-iters 2 --eval-interval 10 --save-interval 10"
STOPPED = {
    "stopped-base": (
        "base",
        "--architecture gpt --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --dataset text.txt --optimizer adamw "
        "--lr-decay cosine",
    ),
    "stopped-adalora": ("adalora", "--use-lora --base base --dataset other.txt --lora-rank 4 --lora-variant adalora"),
}


@pytest.mark.parametrize("name", LOGITS)
def test_a_finished_run_computes_what_it_computed(name):
    if open_run(RUNS / name).kind == "lora":
        (adapted,) = open_adapters(RUNS, (name,))
        model = adapted.base.model
        adapted.adapter.attach_to(model)
    else:
        model = Base.open(RUNS, name).model
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDX)[0], LOGITS[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_to_the_weights_of_one_that_was_not_stopped(name, tmp_path, data_dir):
    whole, flags = STOPPED[name]
    shutil.copytree(RUNS, tmp_path / "runs")
    for text in ("text.txt", "other.txt"):
        shutil.copy(FIXTURES / text, tmp_path)
    where = ["--checkpoints-dir", "runs", "--data-dir", "cache", "--run-name", name]
    done = run_command(tmp_path, data_dir, "training.py", *SETTINGS.split(), *flags.split(), *where)
    assert done.returncode == 0, done.stderr
    assert f"Going on with {name} after step 10 of 20" in done.stderr
    product = "adapter/adapter_model.safetensors" if whole == "adalora" else "model/model.safetensors"
    found, expected = (load_file(tmp_path / "runs" / one / product) for one in (name, whole))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-4) for key in expected)


def test_a_setting_that_an_old_run_does_not_record_is_told_as_what_it_was(tmp_path, data_dir):
    shutil.copytree(RUNS / "base", tmp_path / "runs" / "base-text")
    shutil.copy(FIXTURES / "text.txt", tmp_path)
    where = ["--checkpoints-dir", "runs", "--data-dir", "cache", "--dataset", "text.txt"]
    shape = STOPPED["stopped-base"][1].partition(" --dataset")[0]
    done = run_command(tmp_path, data_dir, "training.py", *SETTINGS.split(), *shape.split(), *where)
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("base-text was trained with ")]
    assert "OPTIMIZER=adamw, LR_DECAY=cosine, so this is another run" in told and "MUON_LR_RATIO" not in told
