"""The number of processes changes no bit of a run, nor does a stop and going on with another number of them.

Every kind of run is trained on 1, 2 and 4 processes, each number in one start of Python or torchrun. REDUCE=fast is
held to the same run within rounding instead.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from starts import SHORT, TEXT, Case, Ended, in_a_row, of_ours

from runtime.storage.runs import Run, open_run
from tests.pretrained import tiny_models

PROCESSES = (4, 2, 1)
BF16 = (*SHORT, "--dataset=text.txt", "--dtype=bf16", "--batch-size=7", "--step-parts=4", "--dropout=0.2")
FP32 = (*SHORT, "--dataset=text.txt", "--dtype=fp32", "--batch-size=2", "--gradient-accumulation-steps=4")
FP32 += ("--optimizer=adamw", "--dropout=0.1", "--grad-clip=0.1")
LORA = ("--test-mode", "--use-lora", "--max-iters=6", "--eval-interval=3", "--eval-iters=3", "--save-interval=3")
LORA += ("--device=cpu", "--data-dir=data", "--lora-rank=2", "--step-parts=4", "--batch-size=8", "--dtype=bf16")
ON_TEXT = (*LORA, "--dataset=other.txt", "--lora-dropout=0.2")
KINDS = {
    "base": BF16,
    "accumulation": FP32,
    "lora": (*ON_TEXT, "--base=base"),
    "adalora": (*ON_TEXT, "--base=base", "--lora-variant=adalora", "--lora-rank=3"),
    "records": (*LORA, "--base=base", "--dataset=pairs.jsonl", "--packing", "--train-on-prompt"),
    "pretrained": (*LORA, "--base=../theirs", "--dataset=other.txt", "--block-size=16"),
}
FEWER = {4: ("base", "lora", "records")}  # the others are not trained on that many
FAST = (*FP32, "--reduce=fast")
SHARDED = (*FP32, "--shard")
PIECES = ("--base=../on-2/base", "--shard")


def training(folder: str, name: str, *words: str, **more) -> Case:
    return Case((*words, f"--checkpoints-dir={folder}", f"--run-name={name}"), **more)


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> tuple[Path, dict[int, dict[str, list[Ended]]]]:
    """A folder in which everything has been trained on every number of processes, the highest first, which stops in
    the midst of one run that the others then go on with; and how all ended."""
    root = tmp_path_factory.mktemp("same")
    (root / "text.txt").write_text(TEXT)
    (root / "other.txt").write_text(TEXT.replace("you", "thou").replace("to be", "to bee"))
    rows = [{"prompt": f"{i} times?", "completion": "To be." * (i % 4 + 1)} for i in range(60)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_models.save(tiny_models.make("qwen2 tied", torch.bfloat16), root / "theirs")
    ended = {}
    for n in PROCESSES:
        kinds = {name: KINDS[name] for name in FEWER.get(n, KINDS)}
        cases = {name: training(f"on-{n}", name, *words) for name, words in kinds.items()}
        if n == 4:
            cases["stopped"] = training("stopped", "base", *BF16, interrupt=(2, 5))
            cases["stopped in pieces"] = training("stopped", "fast", *SHARDED, interrupt=(1, 5))
        else:
            shutil.copytree(root / "stopped", root / f"resumed-{n}")
            cases["resumed"] = training(f"resumed-{n}", "base", *BF16)
            cases["fast"] = training(f"on-{n}", "fast", *FAST)
            cases["resumed in pieces"] = training(f"resumed-{n}", "fast", *(FAST if n == 1 else SHARDED))
        if n == 2:
            cases["fast again"] = training("again-2", "fast", *FAST)
            cases["sharded"] = training("pieces", "fast", *SHARDED)
            cases["sharded muon"] = training("pieces", "muon", *SHARDED, "--optimizer=muon")
            cases["sharded lora"] = training("pieces", "lora", *ON_TEXT, *PIECES)
            cases["sharded records"] = training(
                "pieces", "records", *KINDS["records"], "--base=../on-2/base", "--shard"
            )
            cases["muon"] = training("on-2", "muon", *FAST, "--optimizer=muon")
            cases["sums"] = Case((), "tests/processes/sums_of_processes.py")
        ended[n] = in_a_row(root, n, cases)
    return root, ended


def finished(started, folder: str, name: str) -> Run:
    run = open_run(started[0] / folder / name)
    assert run and run.finished, {n: ended.get(name) for n, ended in started[1].items()}
    return run


def product(run: Run) -> bytes:
    (file,) = run.artifact.glob("*.safetensors")
    return file.read_bytes()


def losses(run: Run) -> list[tuple]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]


def results(run: Run) -> dict:
    return {name: value for name, value in run.result.items() if name in ("val_loss", "best", "best_step", "stale")}


def same(one: Run, other: Run) -> bool:
    return product(one) == product(other) and losses(one) == losses(other) and results(one) == results(other)


@pytest.mark.parametrize(("kind", "n"), [(kind, n) for n in (2, 4) for kind in FEWER.get(n, KINDS)])
def test_the_number_of_processes_changes_no_bit(started, kind, n):
    one, many = finished(started, "on-1", kind), finished(started, f"on-{n}", kind)
    assert one.metadata["identity"] == many.metadata["identity"]
    assert len(losses(one)) >= 6 and losses(one)[0][1] != losses(one)[-1][1]
    assert same(one, many)


@pytest.mark.parametrize("n", [2, 4])
def test_the_first_process_alone_speaks_and_all_end_well(started, n):
    for name, (first, *others) in started[1][n].items():
        if not name.startswith("stopped"):
            assert [process.status for process in (first, *others)] == [0] * n, (name, first.told)
            assert [other.told for other in others] == [""] * (n - 1), name
            assert ("has finished" in first.told) == (name != "sums"), name


def test_a_run_that_one_of_four_processes_stopped_goes_on_on_one_and_on_two(started):
    stopped = started[1][4]["stopped"]
    assert [process.status for process in stopped] == [143] * 4
    said = [line for process in stopped for line in of_ours(process.told)]
    assert said == ["stopped after step 5, which is saved; the same command goes on there"], "one of them says it"
    for n in (1, 2):
        assert "Going on with base after step 5 of 6" in started[1][n]["resumed"][0].told
        assert same(finished(started, f"resumed-{n}", "base"), finished(started, "on-1", "base"))


def test_a_fast_reduction_is_the_same_run_within_rounding(started):
    """Losses of seven digits; the exact bounds, on gradients, are in `sums_of_processes.py`."""
    exact = finished(started, "on-1", "accumulation")
    for n in (1, 2):
        fast = finished(started, f"on-{n}", "fast")
        assert fast.metadata["identity"] != exact.metadata["identity"]
        for ours, theirs in zip(losses(fast), losses(exact), strict=True):
            assert all(a == b or math.isclose(a, b, rel_tol=1e-5) for a, b in zip(ours, theirs, strict=True))
        (ours,), (theirs,) = (run.artifact.glob("*.safetensors") for run in (fast, exact))
        torch.testing.assert_close(load_file(ours), load_file(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "name", "like"),
    [
        ("pieces", "fast", "on-1"),
        ("pieces", "muon", "on-2"),
        ("resumed-1", "fast", "on-1"),
        ("resumed-2", "fast", "on-1"),
    ],
)
def test_a_model_in_pieces_is_the_same_run_within_rounding(started, folder, name, like):
    """Also where 4 processes began it, and 2 or a single one, which has it whole, went on."""
    pieces, whole = finished(started, folder, name), finished(started, like, name)
    assert pieces.metadata["identity"] == whole.metadata["identity"]
    for ours, theirs in zip(losses(pieces), losses(whole), strict=True):
        assert all(a == b or math.isclose(a, b, rel_tol=1e-5) for a, b in zip(ours, theirs, strict=True))
    (ours,), (theirs,) = (run.artifact.glob("*.safetensors") for run in (pieces, whole))
    torch.testing.assert_close(load_file(ours), load_file(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "records"])
def test_lora_on_a_base_in_pieces_changes_no_bit(started, kind):
    assert same(finished(started, "pieces", kind), finished(started, "on-1", kind))


def test_a_fast_reduction_repeats_itself(started):
    assert same(finished(started, "on-2", "fast"), finished(started, "again-2", "fast"))
