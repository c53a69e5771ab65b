"""What several processes cannot do, or what goes wrong in one of them, is one line, after which all have ended.

All that needs processes is tried on two of them in one start of torchrun.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from starts import ODD, ROOT, SHORT, TEXT, TRACEBACK, Case, Ended, clean, in_a_row, of_ours

from runtime.errors import UsageError
from runtime.processes import alike
from runtime.processes.launch import Launch
from runtime.processes.world import World
from runtime.storage.folders import read_folder
from runtime.storage.lock import RunLock

RUN = (*SHORT, "--dataset=text.txt", "--dtype=fp32", "--batch-size=4", "--step-parts=2")
REFUSED = {
    "one part": (
        Case((*SHORT, "--dataset=text.txt")),
        2,
        "error: 2 processes share the parts of a step equally, and STEP_PARTS=1 (by default "
        "GRADIENT_ACCUMULATION_STEPS): set STEP_PARTS=2",
    ),
    "three parts": (
        Case((*RUN, "--step-parts=3")),
        2,
        "error: REDUCE=exact needs STEP_PARTS to be 2, 4, 8, ..., and it is 3: set STEP_PARTS=4",
    ),
    "more parts than rows": (
        Case((*RUN, "--step-parts=8")),
        2,
        "error: a step has 4 rows (BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS), which cannot be cut into STEP_PARTS=8",
    ),
    "other settings": (
        Case(RUN, odd=(("1", {"SEED": "7"}),)),
        2,
        "error: processes 0 and 1 must have the same SEED, and have 1337 and 7",
    ),
    "a bad value": (
        Case((*RUN, "--seed=-1")),
        2,
        "error: --seed -1 (flag): must be a whole number from 0 to 2147483647",
    ),
    "a bad value in one": (
        Case(RUN, odd=(("1", {"SEED": "seven"}),)),
        2,
        "error: SEED=seven (from the environment): must be a whole number from 0 to 2147483647",
    ),
    "no such text": (Case((*RUN, "--dataset=gone.txt")), 2, "error: gone.txt: there is no such text file"),
    "in pieces, but exact": (
        Case((*RUN, "--shard", "--reduce=exact", "--compile")),
        2,
        "error: SHARD=True of a model that trains whole does not work with COMPILE=True and REDUCE=exact: leave out",
    ),
    "in pieces of 4 bits": (
        Case((*RUN, "--shard", "--use-lora", "--quantize=nf4")),
        2,
        "error: SHARD=True does not work with QUANTIZE=nf4: leave out one or the other",
    ),
    "compare": (
        Case(("--test-mode",), "compare.py"),
        2,
        "error: {root}/compare.py works as one process: start it without torchrun",
    ),
    "adapters": (
        Case(("list",), "adapters.py"),
        2,
        "error: {root}/adapters.py works as one process: start it without torchrun",
    ),
    "trained already": (
        Case((*RUN, "--run-name=locked")),
        1,
        "error: run locked is being trained by process {pid}; wait for it, or choose another RUN_NAME",
    ),
    "not finite": (
        Case((*RUN, "--run-name=high", "--learning-rate=1e20", "--save-interval=1")),
        1,
        "error: the loss or a gradient is not finite at step 1, so the run stopped before that update; lower "
        "LEARNING_RATE, or set DTYPE=fp32 if it was lower; its batch is in checkpoints/high/nonfinite-batch.json",
    ),
    "an error in one": (Case((*RUN, "--run-name=odd", "--max-iters=20"), "odd.py"), 1, "error: the cable is out"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder in which all was tried, and how all ended."""
    root = tmp_path_factory.mktemp("refused")
    (root / "text.txt").write_text(TEXT)
    (root / "odd.py").write_text(ODD.format(root=str(ROOT), rank="1", error="UserError('the cable is out')"))
    cases = {name: case for name, (case, *_) in REFUSED.items()}
    cases["an error in one"].script = str(root / "odd.py")
    (root / "checkpoints/locked").mkdir(parents=True)
    with RunLock(root / "checkpoints/locked"):
        return root, in_a_row(root, 2, cases)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line_of_one_process_and_all_end(ended, name):
    _, status, line = REFUSED[name]
    processes: list[Ended] = ended[1][name]
    assert not any(TRACEBACK in process.told for process in processes)
    (told,) = [line for process in processes for line in of_ours(process.told)]
    assert told.startswith(line.format(root=ROOT, pid=os.getpid())), told
    assert max(process.status for process in processes) == status and all(p.status in (1, 2, -15) for p in processes)


def test_what_was_saved_before_an_error_in_one_process_is_intact(ended):
    for name in ("odd/step-000012", "high/step-000001"):
        assert read_folder(ended[0] / "checkpoints" / name)


def test_a_single_process_has_no_pieces(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "training.py", *RUN, "--shard"], cwd=tmp_path, env=clean(), capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and of_ours(done.stderr) == [
        "error: SHARD=True needs several processes: start them with torchrun, or leave it out"
    ]


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RANK": "0"}, "error: RANK is set in the environment, but not WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, "
                        "MASTER_ADDR, MASTER_PORT; start several processes with torchrun, or unset RANK and WORLD_SIZE "
                        "for one\n"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
         "error: the processes cannot meet at 127.0.0.1:{port}: the port is in use; choose another --master-port\n"),
    ],
)  # fmt: skip
def test_an_environment_that_was_set_by_hand_is_refused_in_one_line(tmp_path, environ, told):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        more = {"MASTER_PORT": port} if "MASTER_ADDR" in environ else {}
        done = subprocess.run(
            [sys.executable, ROOT / "training.py", *RUN], cwd=tmp_path, env=clean(**environ, **more),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.stderr == told.format(port=port) and done.returncode in (1, 2)


@pytest.mark.parametrize(
    ("device", "there", "told"),
    [
        ("cuda", {"count": 1}, "2 processes on this machine need a GPU each, and there are 1"),
        ("cuda", {"count": 1, "shown": "3"},
         "2 processes on this machine need a GPU each, and there are 1, as CUDA_VISIBLE_DEVICES=3 has it"),
        ("cuda:1", {}, "DEVICE=cuda:1 with several processes: leave the number out, as each takes its own GPU"),
        ("mps", {}, "several processes cannot work on mps: set DEVICE=cpu, or start one only"),
        ("cuda", {"nccl": False}, "this build of torch has no NCCL, by which GPUs talk; set DEVICE=cpu"),
        ("cpu", {"gloo": False}, "this build of torch has no gloo, by which processes talk; start one process only"),
    ],
)  # fmt: skip
def test_a_device_on_which_processes_cannot_talk_is_refused(monkeypatch, device, there, told):
    monkeypatch.setattr(dist, "is_gloo_available", lambda: there.get("gloo", True))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: there.get("nccl", True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there.get("count", 2))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if "shown" in there:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", there["shown"])
    with pytest.raises(UsageError) as error:
        World(Launch(1, 4, 1, 2)).join(1, torch.device(device))
    assert str(error.value) == told


@pytest.mark.parametrize("name", ["Python", "torch"])
def test_other_versions_on_one_process_are_refused(monkeypatch, name):
    """What processes tell each other is put in their mouths, as there is one Python here."""
    world = World(Launch(0, 2))
    monkeypatch.setattr(world, "gather", lambda values: [values, values | {name: "0.1"}])
    monkeypatch.setattr(alike, "world", lambda: world)
    with pytest.raises(UsageError, match=f"processes 0 and 1 must have the same {name}, and have .* and 0.1"):
        alike.check_alike({"seed": 1, "data_dir": "here"}, "cpu, fp32")
