"""Run folders: their names, resumable steps, the best weights so far, the lock, and what is kept.

checkpoints/<run>/
    run.json            what the run is: settings, shape, base, identity
    metrics.jsonl       one JSON object a line
    step-000250/        a resumable step: weights, optimizer, state        (while the run goes on)
    best-000250/        what the run is for, at its lowest validation loss (while the run goes on)
    model/ or adapter/  the best weights again, published when the run has finished
    result.json         what a finished run came to
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

from runtime import storage
from runtime.errors import UsageError, UserError

PRODUCTS = {"base": "model", "full": "model", "lora": "adapter"}


def say(message: str) -> None:
    """A message to the person at the terminal: stderr, so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)


def pack(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    return safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, metadata)


def unpack(data: bytes, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises DamagedError, naming the file, where it is none."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise storage.DamagedError(f"{name} is not a whole safetensors file: {error}") from None


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever order or device they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def read_json(data: bytes, name: str) -> dict:
    """A JSON object. Raises DamagedError, naming the file, where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise storage.DamagedError(f"{name} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise storage.DamagedError(f"{name} is damaged: not a JSON object")
    return value


def to_json(value: dict) -> bytes:
    """A JSON object as readable bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Run:
    """One folder of runs, and what `run.json` in it says."""

    folder: Path
    about: dict

    @property
    def name(self) -> str:
        """The folder's name, which is the run's."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """`base`, `full` (fine-tuned from a base) or `lora`."""
        return self.about["kind"]

    @property
    def product(self) -> Path:
        """Where the run's weights or adapter are once it has finished."""
        return self.folder / PRODUCTS[self.kind]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.product.is_dir()

    @property
    def result(self) -> dict:
        """What `result.json` says; empty before the run has finished."""
        path = self.folder / "result.json"
        return read_json(path.read_bytes(), str(path)) if path.exists() else {}

    def saved(self, prefix: str) -> list[tuple[int, Path]]:
        """The committed folders `<prefix>-<step>`, oldest first."""
        found = [(re.fullmatch(rf"{prefix}-(\d+)", path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in found if match)

    def save(self, prefix: str, step: int, files: dict[str, bytes], keep: int) -> None:
        """Commit a folder `<prefix>-<step>`, then remove the oldest of that prefix beyond `keep`."""
        folder = self.folder / f"{prefix}-{step:06d}"
        if not folder.exists():
            storage.commit_folder(folder, files)
        for _, old in self.saved(prefix)[:-keep]:
            storage.remove_folder(old)

    def newest(self, prefix: str) -> tuple[int, dict[str, bytes]] | None:
        """The newest good `<prefix>-<step>`; what is damaged is named on stderr, removed, and the one before taken."""
        for step, folder in reversed(self.saved(prefix)):
            try:
                return step, storage.read_folder(folder)
            except storage.DamagedError as error:
                say(f"{error}; falling back to the one before")
                storage.remove_folder(folder)
        return None

    def read(self) -> dict[str, bytes]:
        """The files of what the run is for: its finished product, else its best weights so far.

        Raises UserError where it has neither yet.
        """
        if self.finished:
            return storage.read_folder(self.product)
        for _, folder in reversed(self.saved("best")):
            return storage.read_folder(folder)
        raise UserError(f"run {self.name} has not saved anything yet; start it again to go on with it")

    def publish(self, result: dict) -> None:
        """Finish: write down what the run came to, give its best weights their final name, drop what resumes it."""
        storage.write_file(self.folder / "result.json", to_json(result))
        storage.publish_folder(self.saved("best")[-1][1], self.product)
        for prefix in ("step", "best"):
            for _, folder in self.saved(prefix):
                storage.remove_folder(folder)


def open_run(folder: Path) -> Run | None:
    """The run in this folder, or None where there is none."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    about = read_json(path.read_bytes(), str(path))
    if about.get("kind") not in PRODUCTS:
        raise storage.DamagedError(f"{path} is damaged: kind is {about.get('kind')!r}")
    return Run(folder, about)


def all_runs(root: Path) -> list[Run]:
    """Every run below `root`, the newest last."""
    runs = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            runs += [run] if (run := open_run(folder)) else []
        except storage.DamagedError as error:
            say(f"{error}; leaving that run out")
    return sorted(runs, key=lambda run: (run.product if run.finished else run.folder / "run.json").stat().st_mtime_ns)


def find_run(root: Path, name: str) -> Run:
    """The run of that name (or at that path). Raises UsageError with the names there are."""
    for folder in (root / name, Path(name)):
        if run := open_run(folder):
            return run
    known = ", ".join(run.name for run in all_runs(root)) or "none yet"
    raise UsageError(f"there is no run {name!r} in {root}; runs there: {known}")


def identity_of(about: dict) -> str:
    """A short hash of what defines a run's result: equal for runs that would compute the same."""
    return storage.sha256(json.dumps(about, sort_keys=True).encode())[:12]


def claim(root: Path, plain_name: str, chosen_name: str, about: dict, fresh: bool) -> Run:
    """The folder for a run of this identity: a new one, or the one where it stands already.

    The plain name gets a short hash where it is taken by other settings; a chosen name that is taken is an error.
    With `fresh`, a run that stands there is moved aside first, never deleted.
    """
    folder = root / (chosen_name or plain_name)
    there = open_run(folder)
    if there and there.about["identity"] != about["identity"] and not fresh:
        if chosen_name:
            raise UsageError(
                f"RUN_NAME={chosen_name} is taken by a run with other settings; "
                "choose another name, or FRESH=True to move that run aside"
            )
        folder = root / f"{plain_name}-{about['identity'][:6]}"
        there = open_run(folder)
    if there and fresh:
        aside = next(p for i in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.old{i}")).exists())
        storage.publish_folder(folder, aside)
        say(f"FRESH=True: the run that was in {folder} is now in {aside}")
        there = None
    if there is None:
        storage.write_file(folder / "run.json", to_json(about))
    return there or Run(folder, about)


class RunLock:
    """Keeps a second run out of a run's folder while this one writes; the system drops it with the process."""

    def __init__(self, run: Run) -> None:
        self.run, self.lock = run, filelock.FileLock(run.folder / ".lock", timeout=0)
        self.holder = run.folder / ".lock-holder"

    def __enter__(self) -> None:
        try:
            self.lock.acquire()
        except filelock.Timeout:
            holder = self.holder.read_text() if self.holder.exists() else "another process"
            raise UserError(
                f"run {self.run.name} is being trained by {holder}; wait for it, or choose another RUN_NAME"
            ) from None
        self.holder.write_text(f"process {os.getpid()}")

    def __exit__(self, *_: object) -> None:
        self.holder.unlink(missing_ok=True)
        self.lock.release()
