"""A fault at every file-system operation of real training runs; after each, the next start must lose nothing.

PYTHONPATH=. python tests/runtime/fault_sweep.py FOLDER [--kinds base lora] [--modes kill] [--most 10] [--skip 3]

For each kind of run, its operations are counted (N) in a run without faults. Then for each k <= N the command runs with
a fault at operation k, and runs again without: weights, optimizer, losses and files must be those of the uninterrupted
run. Prints points counted and struck for each kind and mode, and exits 1 where they differ or anything was lost.
Children are forked from this process, which has imported torch and computed nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # what the first optimizer would import, in every child anew
import torch.distributed as dist
from faulty_disk import MODES, FaultyDisk, applies

import jobs.summaries.text
import jobs.training.command  # what training.py needs, once
import training
from jobs.runs import loop
from lora.peft_format import load_adapter, save_adapter
from runtime.processes.command import run_command
from runtime.processes.world import world
from runtime.storage.content import sha256
from runtime.storage.folders import read_folder
from runtime.training.resume import OPTIMIZER, WEIGHTS, to_files
from tests.pretrained import tiny_models

CHANGES = ("fsync", "rename", "replace", "unlink", "rmdir")
KINDS = ("base", "full", "lora", "pretrained", "records", "adapter")
TOGETHER = ("first", "second")  # bases that two processes train, with the fault in one of them
TINY = ("--test-mode", "--n-layer=1", "--n-embd=8", "--n-head=1", "--block-size=8")
SHORT = ("--test-mode", "--max-iters=4", "--save-interval=2", "--eval-interval=2", "--eval-iters=1", "--dtype=fp32")
SHORT += ("--batch-size=2", "--gradient-accumulation-steps=2", "--dropout=0.1", "--keep-checkpoints=1", "--patience=9")
TEXT = "To be, or not to be, that is the question:\n" * 20


@dataclass
class Ended:
    """How a child ended. status: as waitpid tells it; others: those of the processes beside it; struck: whether the
    fault happened; log: its operations."""

    status: int
    others: list[int]
    struck: bool
    told: str
    log: list[tuple[str, str, str]]


@dataclass
class Starter:
    """Starts a command in `folder`/case as `processes` children, of which number `faulty` has the fault; what they
    print goes beside the case."""

    folder: Path
    processes: int = 1
    faulty: int = 0

    def start(self, work: Callable[[], None], k: int = 0, mode: str = "kill") -> Ended:
        """Run it, with a fault at operation k, until all have ended."""
        struck, log = mmap.mmap(-1, 1), self.folder / "log.json"
        log.unlink(missing_ok=True)
        agent, launch = meeting_place() if self.processes > 1 else (0, {})
        children = []
        for rank in range(self.processes):
            if (child := os.fork()) == 0:
                if launch:
                    os.environ.update(launch | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
                if rank == self.faulty:
                    disk = FaultyDisk(self.folder / "case", k, mode, lambda: struck.write_byte(1))
                    self.be_child(rank, work, disk, log)
                self.be_child(rank, work)
            children.append(child)
        statuses = self.wait_for(children)
        if agent:
            os.kill(agent, signal.SIGKILL)
            os.waitpid(agent, 0)
        operations = json.loads(log.read_text()) if log.exists() else []
        told = "".join((self.folder / f"told-{rank}").read_text("utf-8", "replace") for rank in range(self.processes))
        return Ended(statuses.pop(self.faulty), statuses, struck[0] == 1, told, operations)

    def be_child(self, rank: int, work: Callable[[], None], disk: FaultyDisk | None = None, log: Path | None = None):
        """Run the command in this process, for good; its operations are logged if it comes to its end."""
        end_now = os._exit

        def end(status: int) -> None:
            if disk:
                log.write_text(json.dumps(disk.log))
            end_now(status)

        try:
            os._exit = end
            os.chdir(self.folder / "case")
            told = os.open(self.folder / f"told-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(told, 1), os.dup2(told, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8") for fd in (1, 2))
            if disk:
                disk.install()
            try:
                run_command(work, many=self.processes > 1)
            except SystemExit as ending:
                end(ending.code or 0)
        except BaseException as error:
            os.write(2, f"Traceback: {type(error).__name__}: {error}".encode())
        finally:
            end_now(99)

    def wait_for(self, children: list[int]) -> list[int]:
        """How each ended. When one has failed, the others get SIGTERM, as from torchrun."""
        statuses: dict[int, int] = {}
        while len(statuses) < len(children):
            child, status = os.wait()
            if child not in children:
                continue
            if status and not any(statuses.values()):
                for other in set(children) - {child, *statuses}:
                    os.kill(other, signal.SIGTERM)
            statuses[child] = os.waitstatus_to_exitcode(status)
        return [statuses[child] for child in children]


def meeting_place() -> tuple[int, dict[str, str]]:
    """A process in which others meet that work on one command, as they do in torchrun, and what tells them of it."""
    parent, (read, write) = os.getpid(), os.pipe()
    if (agent := os.fork()) == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        os.close(write)
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)
    os.close(write)
    port = os.read(read, 10).decode()
    os.close(read)
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return agent, launch | {"TORCHELASTIC_USE_AGENT_STORE": "True"}


class Sweep:
    """One kind of run in a folder of its own: its command, and what an uninterrupted run leaves."""

    def __init__(self, folder: Path, kind: str, base: Path, adapter: Path | None) -> None:
        self.folder, self.kind, self.adapter, self.trained = folder, kind, adapter, folder / "trained"
        self.starter = Starter(folder, 2, TOGETHER.index(kind)) if kind in TOGETHER else Starter(folder)
        lora = (f"--base={base}", "--use-lora", "--lora-rank=2")
        own = {
            "base": TINY,
            "first": TINY,
            "second": TINY,
            "full": (f"--base={base}",),
            "lora": lora,
            "pretrained": (*lora, "--block-size=8"),
            "records": (*lora, "--packing"),
        }
        dataset = folder.parent / ("pairs.jsonl" if kind == "records" else "text.txt")
        self.flags = (*SHORT, f"--dataset={dataset}", "--data-dir=data", *own.get(kind, ()))
        done = self.start()
        assert done.status == 0, done.told
        self.log, self.whole = done.log, self.left()

    def start(self, k: int = 0, mode: str = "kill") -> Ended:
        """Start the command where nothing has run yet."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "case").mkdir(parents=True)
        return self.again(k, mode)

    def again(self, k: int = 0, mode: str = "kill") -> Ended:
        """Start the command on what the last start left."""
        return self.starter.start(self.copy if self.kind == "adapter" else self.train, k, mode)

    def train(self) -> None:
        """training.py itself; when its steps are done, their weights and optimizer are noted beside the case."""
        all_steps = loop.Training.all_steps

        def noted(this):
            state = all_steps(this)
            files = to_files(this.stepper, state)
            if world().leads:
                self.trained.write_text(sha256(bytes(files[WEIGHTS]) + bytes(files[OPTIMIZER])))
            return state

        loop.Training.all_steps = noted
        jobs.summaries.text.TEST_SAMPLE_CHARACTERS = 4
        sys.argv = ["training.py", *self.flags]
        training.main()

    def copy(self) -> None:
        """What a command does that reads an adapter and saves one, unless it has been done."""
        if not Path("exported/mine").exists():
            save_adapter(Path("exported/mine").absolute(), load_adapter(self.adapter))

    def left(self) -> dict:
        """Everything that must be equal whether or not a run was interrupted."""
        if self.kind == "adapter":
            return {"mine": read_folder(self.folder / "case" / "exported" / "mine")}
        (run,) = (path.parent for path in (self.folder / "case" / "checkpoints").glob("*/run.json"))
        product = next(path for path in (run / "model", run / "adapter") if path.exists())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = ("step", "loss", "lr", "val_loss", "best", "best_step", "stale")
        result = json.loads((run / "result.json").read_bytes())
        return {
            "product": read_folder(product),
            "trained": self.trained.read_text(),
            "metrics": [{key: line[key] for key in kept if key in line} for line in lines],
            "result": {key: result[key] for key in kept if key in result},
            "files": sorted(path.name for path in run.iterdir() if path.name != ".lock"),
        }

    def problem(self, k: int, mode: str) -> tuple[bool, str]:
        """Whether a fault at k struck, and what was lost or told badly; empty where all is well."""
        first = self.start(k, mode)
        if not first.struck:
            return False, "the fault was not reached"
        if "Traceback" in first.told or first.status not in ((-9,) if mode in ("kill", "torn") else (0, 1)):
            return True, f"it ended with {first.status}: {first.told[-600:]}"
        if not set(first.others) <= {0, 1, -signal.SIGTERM} or first.told.count("error: ") > 1:
            return True, f"the others ended with {first.others}: {first.told[-600:]}"
        second = self.again()
        if second.status or any(second.others) or "Traceback" in second.told:
            return True, f"the next start ended with {second.status}: {second.told[-600:]}"
        now = self.left()
        return True, " and ".join(key for key, value in self.whole.items() if now.get(key) != value)

    def unsafe_commits(self) -> list[str]:
        """Renames before whatever was written had been synced, or without a sync of the folder after it."""
        unsynced, found = set(), []
        for i, (name, path, target) in enumerate(self.log):
            if name in ("open", "write", "mkdir") and not path.endswith(".lock"):
                unsynced.add(path)
            elif name == "fsync":
                unsynced.discard(path)
            elif name in ("rename", "replace") and "/.tmp-removed-" not in target:
                found += [f"{path} not synced: {p}" for p in unsynced if p == path or p.startswith(f"{path}/")]
                unsynced = {p for p in unsynced if p != path and not p.startswith(f"{path}/")}
                after = [tuple(step[:2]) for step in self.log[i + 1 :] if step[0] in CHANGES]
                if after[:1] != [("fsync", str(Path(target).parent))]:
                    found.append(f"{target}: its folder is not synced next")
        return found


def sweep(folder: Path, kinds: list[str], modes: list[str], most: int | None, skip: int) -> int:
    """All kinds and modes; returns how many problems there were. most: points of each kind and mode, evenly spread."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(TEXT)
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "To"}) + "\n" for i in range(60))
    )
    problems, began = 0, time.perf_counter()
    base = adapter = folder
    if not set(kinds) <= {"base", *TOGETHER}:
        base = Sweep(folder / "start", "base", Path(), None).folder / "case/checkpoints/test-base-text"
        adapter = Sweep(folder / "adapted", "lora", base, None).folder / "case/checkpoints/test-lora-text-r2/adapter"
        tiny_models.save(tiny_models.make("qwen2 tied", torch.bfloat16), folder / "theirs")
    for kind in kinds:
        one = Sweep(folder / kind, kind, folder / "theirs" if kind == "pretrained" else base, adapter)
        for line in (unsafe := one.unsafe_commits()):
            print(f"{kind}: {line}")
        problems += len(unsafe)
        for mode in modes:
            points = [k for k, (name, *_) in enumerate(one.log, 1) if applies(mode, name)]
            if most and len(points) > most:
                points = [points[(i * len(points) + skip) // most % len(points)] for i in range(most)]
            struck, bad = 0, 0
            for k in points:
                hit, lost = one.problem(k, mode)
                struck, bad = struck + hit, bad + bool(lost)
                if lost:
                    print(f"{kind}, {mode} at {k}, {' '.join(one.log[k - 1][:2])}: {lost}", flush=True)
            problems += bad + (struck != len(points))
            print(
                f"{kind}, {mode}: {len(one.log)} operations, {len(points)} points counted, {struck} struck, {bad} bad"
            )
    print(f"{problems} problems in {time.perf_counter() - began:.0f} s", flush=True)
    return problems


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *TOGETHER), default=KINDS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--most", type=int)
    parser.add_argument("--skip", type=int, default=0)
    given = parser.parse_args()
    gc.freeze()  # else a child's first collection looks at, and so copies, all that was imported
    sys.exit(bool(sweep(given.folder.absolute(), given.kinds, given.modes, given.most, given.skip)))
