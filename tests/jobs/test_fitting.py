"""A run's memory is told before it is taken: a dry run, what is refused and with what it would fit, and auto."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from jobs.runs.fitting import CLOSE, TOO_MUCH, check_fits, largest_batch, ranks_told
from jobs.runs.footprint import Plan, Shape, footprint
from lora.config import LoRAConfig
from models.config import ModelConfig
from runtime.device import Machine
from runtime.errors import UsageError, UserError
from runtime.report import size
from tests.commands.command_line import run

CONFIG = ModelConfig(96, 1024, 12, 16, max_positions=256)
CPU = Machine(torch.device("cpu"), torch.bfloat16)
PLAN = Plan(Shape(CONFIG), CPU, LoRAConfig(), 8, 256, keeps="none")
TINY = ("--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "8", "--max-iters", "3", "--dtype", "fp32")
LLAMA_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "torch_dtype": "float16",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    lines = [f"line {i} of a text that says something new each time\n" for i in range(100)]
    (tmp_path / "new.txt").write_text("".join(lines))
    return tmp_path


def peak(plan: Plan, **changes) -> int:
    return footprint(replace(plan, **changes)).peak


CHEAPER = [  # what is changed, in the order in which it is tried
    ({"keeps": "cheap"}, "CHECKPOINT_ACTIVATIONS=cheap"),
    ({"keeps": "block"}, "CHECKPOINT_ACTIVATIONS=block"),
    ({"keeps": "block", "quantize": "nf4"}, "CHECKPOINT_ACTIVATIONS=block QUANTIZE=nf4"),
    (
        {"keeps": "block", "quantize": "nf4", "rows": 4, "batches": 2},
        "CHECKPOINT_ACTIVATIONS=block QUANTIZE=nf4 BATCH_SIZE=4 GRADIENT_ACCUMULATION_STEPS=2",
    ),
]


@pytest.mark.parametrize(("changed", "told"), CHEAPER)
def test_a_run_that_does_not_fit_is_refused_with_the_first_settings_that_would(changed, told, capsys):
    free, found = int(peak(PLAN, **changed) / CLOSE) + 1, footprint(PLAN)
    if found.peak <= TOO_MUCH * free:
        pytest.skip("this one would only be warned of")
    with pytest.raises(UserError) as caught:
        check_fits(PLAN, found, free)
    line = str(caught.value)
    assert f"; with {told} it takes {size(peak(PLAN, **changed))}, and FORCE=True begins all the same" in line
    assert line.startswith(f"this run takes about {size(found.peak)} at its peak, and {size(free)} are free")
    check_fits(PLAN, found, free, force=True)
    assert "warning: this run takes about" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "said"), [(0.5, ""), (0.84, ""), (0.9, "warning"), (1.14, "warning"), (1.2, None)])
def test_what_is_close_is_warned_of(share, said, capsys):
    found = footprint(PLAN)
    if said is None:
        with pytest.raises(UserError):
            check_fits(PLAN, found, int(found.peak / share))
    else:
        check_fits(PLAN, found, int(found.peak / share))
        assert capsys.readouterr().err.startswith(said) and (said or not capsys.readouterr().err)
    check_fits(PLAN, found, None)


def test_full_weights_are_not_offered_in_four_bits_and_what_never_fits_is_told():
    plan = replace(PLAN, lora=None)
    with pytest.raises(UserError, match="it still takes .* GB: it needs a smaller model") as caught:
        check_fits(plan, footprint(plan), 10**8)
    assert "QUANTIZE" not in str(caught.value) and "BATCH_SIZE=1 " in str(caught.value)


def test_the_largest_batch_is_a_power_of_two_that_fits():
    free = 4 * 10**9
    rows = largest_batch(PLAN, free)
    assert rows & (rows - 1) == 0
    assert peak(PLAN, rows=rows) <= CLOSE * free < peak(PLAN, rows=2 * rows)
    assert (largest_batch(PLAN, 10**15), largest_batch(PLAN, 1)) == (1024, 1)
    with pytest.raises(UsageError, match="BATCH_SIZE=auto: this system does not tell"):
        largest_batch(PLAN, None)


def test_ranks_that_make_no_sense_are_told():
    def lines(rank: int) -> list[str]:
        return ranks_told(replace(PLAN, lora=LoRAConfig(rank, 16, targets="q_proj,up_proj")))

    assert lines(8) == []
    assert lines(520) == [
        "warning: LORA_RANK=520 is more than q_proj (1024 x 1024) takes in fewer parameters than it has itself: 511"
    ]
    assert lines(1100) == ["warning: LORA_RANK=1100 is more than q_proj (1024 x 1024) can use: 1024"]
    assert ranks_told(replace(PLAN, lora=None)) == []


def test_a_dry_run_tells_and_leaves_nothing(folder, data_dir):
    done = run(folder, data_dir, "training.py", "--dry-run", *TINY)
    assert done.returncode == 0, done.stderr
    for told in (
        "Parameters: 2,",
        "Gradients: ",
        "Optimizer state (muon): ",
        "Activations (CHECKPOINT_ACTIVATIONS=none):",
    ):
        assert told in done.stdout
    assert re.search(r"Peak: about [\d.]+ MB; [\d.]+ GB are free|this system does not tell", done.stdout)
    assert [path.name for path in folder.iterdir()] == ["new.txt"]


def test_seven_billion_weights_need_a_config_only(folder, data_dir):
    (folder / "seven").mkdir()
    (folder / "seven" / "config.json").write_text(json.dumps(LLAMA_7B))
    done = run(folder, data_dir, "training.py", "--dry-run", "--use-lora", "--base", "./seven", "--device", "cpu")
    table = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "all weights" in table["beside activations"] and "LoRA, nf4" in table["beside activations"]
    assert "26.95 GB" in table["weights"] and "13.6" in table["weights"] and "107.8" in table["total"]
    assert "Parameters: 6,778,392,576, of which 39,976,960 train" in done.stdout
    assert [path.name for path in (folder / "seven").iterdir()] == ["config.json"]
    again = run(folder, data_dir, "training.py", "--use-lora", "--base", "./seven", "--dataset", "new.txt", "--force")
    assert again.returncode == 1 and "seven has no model.safetensors" in again.stderr.splitlines()[-1]


def test_a_run_beyond_any_machine_is_refused_before_anything_is_read(folder, data_dir):
    size = ("--n-embd", "65536", "--n-layer", "100", "--device", "cpu")
    for words in ((), ("--dry-run",)):
        done = run(folder, data_dir, "training.py", "--dataset", "nowhere.txt", *size, *words)
        told = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and told.startswith("error: this run takes about "), done.stderr
        assert "it needs a smaller model, or fewer tokens in BLOCK_SIZE" in told
        assert not (folder / "checkpoints").exists()


def test_auto_is_a_number_in_the_run_and_the_same_one_again(folder, data_dir):
    words = ("--dataset", "new.txt", *TINY, "--batch-size", "auto", "--eval-iters", "1")
    done = run(folder, data_dir, "training.py", *words)
    assert done.returncode == 0 and "BATCH_SIZE=auto: 1024" in done.stderr, done.stderr
    about = folder / "checkpoints" / "base-new" / "run.json"
    assert json.loads(about.read_text())["settings"]["batch_size"] == 1024
    again = run(folder, data_dir, "training.py", *words)
    assert again.returncode == 0 and "base-new is finished already" in again.stdout
    named = run(folder, data_dir, "training.py", *words[:-4], "--eval-iters", "1", "--batch-size", "1024")
    assert "base-new is finished already" in named.stdout


def test_every_run_tells_its_memory_in_one_line(folder, data_dir):
    done = run(folder, data_dir, "training.py", "--dataset", "new.txt", *TINY)
    assert len(re.findall(r"^Memory: about [\d.]+ MB at the peak \(weights ", done.stderr, re.MULTILINE)) == 1


@pytest.mark.parametrize("command", ["training.py", "compare.py"])
def test_auto_and_the_flags_of_training_are_refused_elsewhere_in_one_line(folder, data_dir, command):
    done = run(folder, data_dir, command, "--batch-size", "automatic")
    assert done.returncode == 2 and "must be a whole number from 1 to 1000000 or auto" in done.stderr
    if command == "compare.py":
        assert "compare.py does not take --dry-run" in run(folder, data_dir, command, "--dry-run").stderr
