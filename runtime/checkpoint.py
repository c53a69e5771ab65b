"""Run folders: their names, resumable steps, the best weights so far, and what is kept.

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
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from runtime import storage
from runtime.errors import UsageError, UserError
from runtime.lock import RunLock

PRODUCTS = {"base": "model", "full": "model", "lora": "adapter"}


def say(message: str) -> None:
    """A message to the person at the terminal: stderr, so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)


def pack(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    return safetensors_bytes({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, metadata)


def unpack(data: bytes, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises DamagedError, naming the file, where it is none."""
    try:
        return read_safetensors(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        why = str(error).partition("\n")[0]  # torch adds a stack to some
        raise storage.DamagedError(f"{name} is not a whole safetensors file: {why}") from None


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever order or device they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # numpy has no bf16
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
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


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
        """Commit a folder `<prefix>-<step>`, then remove what is older than the newest `keep` of that prefix.

        A run that fell back to an earlier step passes this one again: a good folder is then left as it is. What lies
        further on belongs to the past that was left, and goes too.
        """
        folder = self.folder / f"{prefix}-{step:06d}"
        if folder.exists() and _read(folder) is None:
            storage.remove_folder(folder)
        if not folder.exists():
            storage.commit_folder(folder, files)
        kept = [path for there, path in self.saved(prefix) if there <= step][-keep:]
        for _, path in self.saved(prefix):
            if path not in kept:
                storage.remove_folder(path)

    def newest(self, prefix: str) -> tuple[int, dict[str, bytes]] | None:
        """The newest good `<prefix>-<step>`; what is damaged is named on stderr and left where it is."""
        saved = self.saved(prefix)
        for i, (step, folder) in reversed(list(enumerate(saved))):
            files = _read(folder, "falling back to the one before" if i else "there is none before it")
            if files is not None:
                return step, files
        return None

    def read(self) -> dict[str, bytes]:
        """The files of what the run is for: its finished product, else its best weights so far.

        Raises UserError where it has neither yet, DamagedError where they are damaged.
        """
        if self.finished:
            return storage.read_folder(self.product)
        if best := self.newest("best"):
            return best[1]
        if self.saved("best"):
            raise storage.DamagedError(f"the best weights of run {self.name} are damaged; FRESH=True trains it again")
        raise UserError(f"run {self.name} has not saved anything yet; start it again to go on with it")

    def publish(self, result: dict) -> None:
        """Finish: write down what the run came to, give its best weights their final name, drop what resumes it."""
        storage.write_file(self.folder / "result.json", to_json(result))
        best, _ = self.newest("best")
        storage.publish_folder(dict(self.saved("best"))[best], self.product)
        for prefix in ("step", "best"):
            for _, folder in self.saved(prefix):
                storage.remove_folder(folder)


def _read(folder: Path, otherwise: str = "saving it again") -> dict[str, bytes] | None:
    try:
        return storage.read_folder(folder)
    except storage.DamagedError as error:
        say(f"{error}; {otherwise}")
        return None


def open_run(folder: Path) -> Run | None:
    """The run in this folder, or None where there is none. Raises UserError where it cannot be read."""
    path = folder / "run.json"
    with storage.plain_errors(path, "read"):
        if not path.is_file():
            return None
        about = read_json(path.read_bytes(), str(path))
    for key in ("kind", "identity"):
        if not isinstance(about.get(key), str) or key == "kind" and about[key] not in PRODUCTS:
            raise storage.DamagedError(f"{path} is damaged: {key} is {about.get(key)!r}")
    return Run(folder, about)


def all_runs(root: Path) -> list[Run]:
    """Every run below `root`, by when it finished or else began, the newest last."""
    runs = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            runs += [run] if (run := open_run(folder)) else []
        except UserError as error:
            say(f"{error}; leaving that run out")
    return sorted(runs, key=_last_written)


def _last_written(run: Run) -> int:
    ends = (run.folder / "result.json", run.folder / "run.json")
    return next(path for path in ends if path.exists()).stat().st_mtime_ns


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
    identity = about["identity"]
    names = [chosen_name] if chosen_name else [plain_name, f"{plain_name}-{identity[:6]}", f"{plain_name}-{identity}"]
    for folder in (root / name for name in names):
        there = open_run(folder)
        if there is None or there.about["identity"] == identity or (chosen_name and fresh):
            break
    else:
        raise UsageError(
            f"RUN_NAME={folder.name} is taken by a run with other settings; "
            "choose another name, or FRESH=True to move that run aside"
        )
    if there and fresh:
        _move_aside(there)
        there = None
    if there is None:
        storage.write_file(folder / "run.json", to_json(about))
    return there or Run(folder, about)


def _move_aside(run: Run) -> None:
    with RunLock(run):  # a process that trains it would go on in the folder that takes its name
        pass
    aside = next(p for i in range(1, 10**6) if not (p := run.folder.with_name(f"{run.name}.old{i}")).exists())
    storage.publish_folder(run.folder, aside)
    say(f"FRESH=True: the run that was in {run.folder} is now in {aside}")
