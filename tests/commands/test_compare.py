"""compare.py as a process: full fine-tuning against LoRA, and the sweep of where LoRA starts to pay."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import run

from compare import Options, lora_settings
from jobs.comparison_report import over_seeds
from lora.variants.registry import VARIANTS
from runtime.settings.config import Settings
from runtime.settings.fields import resolve


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
        (("--ranks", "4,x"), "RANKS"),
    ):
        done = run(tmp_path, data_dir, "compare.py", *flags)
        assert done.returncode == 2 and message in done.stderr.upper() or message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_phases_of_a_step_add_up_to_the_figure_of_the_step(seeds):
    def timed(*times: int) -> dict:
        times = dict(zip(("step", "forward", "backward", "optimizer"), map(float, times), strict=True))
        return {"method": "", "milliseconds": times, "loss_at_equal_steps": 1.0}

    runs = [[timed(10, 2, 4, 1), timed(8, 3, 4, 2)], [timed(11, 5, 2, 2), timed(9, 1, 7, 1)]]
    runs.append([timed(30, 9, 9, 9), timed(7, 2, 2, 6)])
    for row in over_seeds(runs[:seeds]):
        step, *phases = row["milliseconds"].values()
        assert sum(phases) == pytest.approx(step, rel=1e-12) and min(phases) > 0
