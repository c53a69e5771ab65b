"""compare.py as a process: full fine-tuning against LoRA, and the sweep of where LoRA starts to pay."""

from __future__ import annotations

import json
import shutil
import statistics

import numpy as np
import pytest
from command_line import run

from jobs.comparing.command import lora_settings
from jobs.comparing.comparison import base_windows, make_method
from jobs.comparing.options import Options
from jobs.comparing.report import over_seeds, verdict
from jobs.comparing.timing import ratio
from jobs.runs.source import TEST_CHARACTERS
from lora.variants.registry import VARIANTS
from runtime.device import pick_machine
from runtime.settings.config import Settings
from runtime.settings.fields import resolve
from runtime.storage.runs import find_run


@pytest.fixture(scope="module")
def base(tmp_path_factory, data_dir):
    """A folder in which a base was trained."""
    folder = tmp_path_factory.mktemp("base")
    trained = run(folder, data_dir, "training.py", TEST_MODE="1", MAX_ITERS="30")
    assert trained.returncode == 0, trained.stderr
    return folder


def test_compare_measures_both_and_says_what_lora_buys(base, tmp_path, data_dir):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    done = run(tmp_path, data_dir, "compare.py", "--max-iters", "20", TEST_MODE="1")
    assert done.returncode == 0, done.stderr
    assert "full fine-tuning's time a step" in done.stdout
    (saved,) = tmp_path.glob("checkpoints/compare-*/results.json")
    full, lora = json.loads(saved.read_bytes())["methods"]
    assert (full["method"], lora["method"]) == ("full", "lora r8")
    assert full["trainable_percent"] == 100 and lora["trainable"] == lora["adapter"] + lora["embeddings"]
    assert full["loss_before"] == lora["loss_before"] > max(full["loss_at_equal_steps"], lora["loss_at_equal_steps"])
    assert full["base_text_loss_before"] == lora["base_text_loss_before"] > 0
    for row in (full, lora):
        phases = sum(row["milliseconds"][phase] for phase in ("forward", "backward", "optimizer"))
        assert phases == pytest.approx(row["milliseconds"]["step"], rel=1e-9) and row["peak_memory"] > 0
        assert [point[0] for point in row["curve"]] == [0, 20] and row["file_bytes"] > 1000
    assert lora["file_bytes"] < full["file_bytes"]
    assert saved.with_name("results.png").read_bytes()[1:4] == b"PNG"


def test_kinds_of_adapters_are_compared_over_seeds(base, tmp_path, data_dir):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    kinds = ("--variants", "adalora", "--seeds", "2", "--max-iters", "4", "--lora-rank", "6")
    done = run(tmp_path, data_dir, "compare.py", *kinds, TEST_MODE="1")
    assert done.returncode == 0, done.stderr
    (saved,) = tmp_path.glob("checkpoints/compare-*/results.json")
    rows = json.loads(saved.read_bytes())["methods"]
    assert [row["method"] for row in rows] == ["full", "adalora r6"]
    for row in rows:
        assert len(set(row["losses"])) == 2 and row["peak_memory"] > 0
        assert row["loss_at_equal_steps"] == sum(row["losses"]) / 2
        assert f"{min(row['losses']):.3f} to {max(row['losses']):.3f}" in done.stdout
    assert saved.with_name("kinds.png").read_bytes()[1:4] == b"PNG"


def test_all_kinds_are_every_variant_and_lora_with_and_without_lora_plus():
    def found(**given) -> dict[str, dict]:
        return lora_settings(
            resolve(Options, given), {k: v for k, v in given.items() if k not in ("variants", "ranks")}
        )

    kinds = found(variants=("all",), lora_plus_ratio=3.0)
    assert {label.split()[0] for label in kinds} == {"lora+", *VARIANTS}
    ratios = {label: Settings.from_dict(values).lora_plus_ratio for label, values in kinds.items()}
    assert [label for label, ratio in ratios.items() if ratio != 3] == ["lora r8"] and ratios["lora r8"] == 1
    assert {"vera r64", "adalora r12"} <= kinds.keys()
    rates = {label: Settings.from_dict(values).learning_rate for label, values in kinds.items()}
    assert len(set(rates.values())) > 3  # each has its own, unless one is given
    given = found(variants=("all",), learning_rate=1e-3, ranks="4").values()
    assert {Settings.from_dict(values).learning_rate for values in given} == {1e-3}
    assert {values["lora_rank"] for values in given} == {4}


def test_a_sweep_keeps_its_cells_and_measures_only_what_is_missing(tmp_path, data_dir):
    def sweep(*flags: str) -> tuple[str, dict]:
        sizes = ("--widths", "32,64", "--batches", "2", "--n-layer", "1", "--block-size", "16")
        done = run(tmp_path, data_dir, "compare.py", "--sweep", *sizes, *flags, TEST_MODE="1")
        assert done.returncode == 0, done.stderr
        (file,) = tmp_path.glob("checkpoints/sweep-*/cells.json")
        assert file.with_name("sweep.png").read_bytes()[1:4] == b"PNG"
        cells = json.loads(file.read_bytes())["cells"]
        return done.stdout, {(c["width"], c["batch"], c["rank"]): c["lora_ms"] for c in cells}

    out, first = sweep("--ranks", "4")
    assert list(first) == [(32, 2, 4), (64, 2, 4)] and "On this machine a LoRA step of rank 4" in out
    out, second = sweep("--ranks", "4,8")
    assert set(second) == {(width, 2, rank) for width in (32, 64) for rank in (4, 8)}
    assert {key: second[key] for key in first} == first and "r=4" in out and "r=8" in out


def test_lists_of_numbers_that_make_no_sense_are_refused(tmp_path, data_dir):
    for flags, message in (
        (("--sweep", "--widths", "30"), "--widths 30: 30 is not a multiple of N_HEAD=4"),
        (("--sweep", "--batches", "0"), "--batches 0: every number must be at least 1"),
        (("--sweep", "--ranks="), "--sweep times LoRA of the ranks in --ranks, which is empty"),
        (("--ranks", "4,x"), "RANKS"),
    ):
        done = run(tmp_path, data_dir, "compare.py", *flags)
        assert done.returncode == 2 and message in done.stderr.upper() or message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_phases_of_a_step_add_up_to_the_figure_of_the_step(seeds):
    def timed(*phases: list[int]) -> dict:
        seconds = dict(zip(("forward", "backward", "optimizer"), phases, strict=True))
        return {"method": "", "seconds": seconds, "tokens_per_step": 8, "loss_at_equal_steps": 1.0}

    runs = [[timed([2, 9, 1], [4, 4, 9], [1, 1, 8]), timed([3, 1, 1], [4, 7, 2], [2, 1, 9])]] * seeds
    rows = over_seeds(runs)
    for row in rows:
        step, *phases = row["milliseconds"].values()
        assert sum(phases) == pytest.approx(step, rel=1e-12) and min(phases) > 0
        assert row["step_over_full"].value == pytest.approx(step / rows[0]["milliseconds"]["step"])
    assert (rows[0]["milliseconds"]["step"], rows[1]["milliseconds"]["step"]) == (14_000, 9_000)


STEADY = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.0]
NOISY = [0.5, 1.4, 0.7, 1.6, 0.9, 0.4, 1.5, 1.1]


@pytest.mark.parametrize(
    "flag", ["--lora-rank=4", "--use-lora", "--run-name=a", "--fresh", "--patience=1", "--save-interval=1"]
)
def test_a_flag_that_a_comparison_would_ignore_is_refused(tmp_path, data_dir, flag):
    done = run(tmp_path, data_dir, "compare.py", flag)
    assert done.returncode == 2 and done.stderr.startswith(f"error: compare.py does not take {flag.split('=')[0]}: ")


@pytest.mark.parametrize(
    ("one", "below"),
    [([0.8 * s for s in STEADY], True), ([1.1 * s for s in STEADY], False), (NOISY, None), (STEADY, False)],
)
def test_a_ratio_of_times_says_where_it_is_too_noisy(one, below):
    found = ratio(one, STEADY)
    assert found.low <= found.value <= found.high and found.below_one is below
    assert found.value == pytest.approx(statistics.median(one) / statistics.median(STEADY))


@pytest.mark.parametrize(
    ("losses", "spoken_of"), [([1.51, 1.53], "LoRA pays here: fast"), ([1.52, 1.53], "LoRA does not")]
)
def test_the_verdict_is_on_the_fastest_kind_of_those_whose_losses_overlap_with_the_lowest(losses, spoken_of):
    def row(method: str, losses: list[float], time: float) -> dict:
        steps = ratio([time * s for s in STEADY], STEADY)
        same = {"loss_before": 2.0, "trainable_percent": 9.0, "peak_memory": None}
        return same | {
            "method": method, "losses": losses, "loss_at_equal_steps": min(losses), "step_over_full": steps
        }  # fmt: skip

    rows = [row("full", [1.4, 1.4], 1.0), row("slow", [1.50, 1.515], 1.1), row("fast", losses, 0.8)]
    assert verdict(rows).startswith(spoken_of)


def test_steps_of_one_speed_are_rarely_said_to_differ():
    random = np.random.default_rng(0)
    draws = [ratio(*random.lognormal(0, 0.3, (2, 100))) for _ in range(200)]
    assert sum(found.low > 1 or found.high < 1 for found in draws) < 25  # 5 % are meant to be


def test_what_a_comparison_cannot_do_is_said_before_its_first_step(base, tmp_path, data_dir):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    done = run(tmp_path, data_dir, "compare.py", "--n-layer", "7", TEST_MODE="1")
    assert done.returncode == 2 and "has another shape: N_LAYER=7 (it has 2)" in done.stderr
    (tmp_path / "gone.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    flags = ("--dataset", "gone.txt", "--max-iters", "3", "--run-name", "gone")
    assert run(tmp_path, data_dir, "training.py", *flags, TEST_MODE="1").returncode == 0
    (tmp_path / "gone.txt").unlink()
    done = run(tmp_path, data_dir, "compare.py", "--base", "gone", "--max-iters", "3", TEST_MODE="1")
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and told.startswith("error: forgetting is measured on the text of the base gone: ")
    assert "DATASET" not in told and "gone.txt" in told


def test_forgetting_is_measured_on_the_text_that_a_test_mode_base_saw(base, data_dir):
    root = base / "checkpoints"
    run_ = find_run(root, "test-base-shakespeare")
    settings = {"test_mode": True, "dtype": "fp32", "checkpoints_dir": str(root), "data_dir": str(data_dir)}
    method = make_method("full", settings | {"eval_iters": 10**6}, pick_machine("cpu", "fp32"), run_)
    tokens = sum(batch.targets.numel() for batch in base_windows(method.job, run_))
    assert 0.9 * TEST_CHARACTERS[1] < tokens < TEST_CHARACTERS[1]
