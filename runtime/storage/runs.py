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

import difflib
import json
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.processes.world import world
from runtime.start import command_line
from runtime.storage import folders
from runtime.storage.content import Content, sha256
from runtime.storage.encoding import read_sealed_json, to_sealed_json
from runtime.storage.lock import RunLock

ARTIFACTS = {"base": "model", "full": "model", "lora": "adapter"}


@dataclass(frozen=True)
class Run:
    """One folder of runs, and what `run.json` in it says."""

    folder: Path
    metadata: dict

    @property
    def name(self) -> str:
        """The folder's name, which is the run's."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """`base`, `full` (fine-tuned from a base) or `lora`."""
        return self.metadata["kind"]

    @property
    def artifact(self) -> Path:
        """Where the run's weights or adapter are once it has finished."""
        return self.folder / ARTIFACTS[self.kind]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.artifact.is_dir()

    @property
    def aside(self) -> bool:
        """Whether FRESH=True moved it aside: it can be used by its name, but is never picked without."""
        return re.fullmatch(r".+\.old\d+", self.name) is not None

    @property
    def result(self) -> dict:
        """What `result.json` says; empty before the run has finished."""
        path = self.folder / "result.json"
        with folders.plain_errors(path, "read"):
            return read_sealed_json(path.read_bytes(), str(path)) if path.exists() else {}

    @property
    def written(self) -> float:
        """When it finished or else began, in seconds since 1970; 0 where it was moved away since it was listed."""
        for path in (self.folder / "result.json", self.folder / "run.json"):
            with suppress(OSError):
                return path.stat().st_mtime_ns / 1e9
        return 0.0

    def saved(self, prefix: str) -> list[tuple[int, Path]]:
        """The committed folders `<prefix>-<step>`, oldest first."""
        with folders.plain_errors(self.folder, "read"):
            found = [(re.fullmatch(rf"{prefix}-(\d{{1,18}})", path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in found if match)

    def save(self, prefix: str, step: int, files: folders.Files, keep: int) -> None:
        """Commit a folder `<prefix>-<step>`, then remove what is older than the newest `keep` of that prefix.

        A run that fell back to an earlier step passes this one again: a good folder is then left as it is. What lies
        further on belongs to the past that was left, and goes too. Several processes do it together, as the first finds
        the folder.
        """
        if world().first(lambda: self.lacks(prefix, step)):
            self.commit(prefix, step, files)
        self.keep_newest(prefix, step, keep)

    def lacks(self, prefix: str, step: int) -> bool:
        """Whether there is no good folder `<prefix>-<step>`; one that is corrupted is removed."""
        folder = self._folder(prefix, step)
        if folder.exists() and _read(folder) is None:
            folders.remove_folder(folder)
        return not folder.exists()

    def commit(self, prefix: str, step: int, files: folders.Files) -> None:
        """Commit a folder `<prefix>-<step>`."""
        folders.commit_folder(self._folder(prefix, step), files)

    def _folder(self, prefix: str, step: int) -> Path:
        return self.folder / f"{prefix}-{step:06d}"

    def keep_newest(self, prefix: str, step: int, keep: int) -> None:
        """Remove folders of a prefix but for the newest `keep` up to this step."""
        kept = [path for there, path in self.saved(prefix) if there <= step][-keep:]
        for _, path in self.saved(prefix):
            if path not in kept:
                folders.remove_folder(path)

    def newest(self, prefix: str) -> tuple[int, folders.Files] | None:
        """The newest good `<prefix>-<step>`; what is corrupted is named on stderr and left where it is."""
        while True:
            saved = self.saved(prefix)
            for i, (step, folder) in reversed(list(enumerate(saved))):
                files = _read(folder, "falling back to the one before" if i else "there is none before it")
                if files is not None:
                    return step, files
                if not folder.exists():  # the run goes on, and has removed it since it was listed
                    break
            else:
                return None

    def read(self) -> folders.Files:
        """The files of what the run is for: its artifact, else its best weights so far.

        Raises UserError where it has neither yet, CorruptedError where they are corrupted.
        """
        there = self.saved("best")  # what comes while this looks is not what it found corrupted
        if not self.finished and (best := self.newest("best")):
            return best[1]
        if self.finished:  # perhaps only now
            try:
                return folders.read_folder(self.artifact)
            except folders.CorruptedError as error:
                raise folders.CorruptedError(f"{error}; FRESH=True trains the run again") from None
        if there:
            raise folders.CorruptedError(
                f"the best weights of run {self.name} are corrupted; FRESH=True trains it again"
            )
        raise UserError(f"run {self.name} has not saved anything yet; start it again to go on with it")

    def write(self, name: str, data: bytes) -> None:
        """Write a file beside what the run saves."""
        folders.write_file(self.folder / name, data)

    def publish(self, result: dict) -> None:
        """Finish: write down what the run came to, give its best weights their final name, drop what resumes it.

        Raises CorruptedError where no best weights can be read.
        """
        self.write("result.json", to_sealed_json(result))
        if not (best := self.newest("best")):
            raise folders.CorruptedError(f"the best weights of run {self.name} cannot be read; start it again")
        folders.publish_folder(dict(self.saved("best"))[best[0]], self.artifact)
        self._drop_saves()

    def tidy(self) -> None:
        """Drop what is left in a finished run whose process was killed, or failed, in its last moments."""
        with suppress(UserError), RunLock(self.folder):
            self._drop_saves()

    def _drop_saves(self) -> None:
        for prefix in ("step", "best"):
            for _, folder in self.saved(prefix):
                folders.remove_folder(folder)


class WatchedRun(Run):
    """A run whose folder another process writes, while this one takes part in its steps: it only reads."""

    def commit(self, prefix: str, step: int, files: folders.Files) -> None:
        """Take part in what must be gathered, and leave the rest to the other."""
        for content in files.values():
            if isinstance(content, Content) and content.gathered:
                deque(content, 0)

    def keep_newest(self, prefix: str, step: int, keep: int) -> None:
        """Leave it to the other."""

    def write(self, name: str, data: bytes) -> None:
        """Leave it to the other."""

    def publish(self, result: dict) -> None:
        """Leave it to the other."""


def _read(folder: Path, otherwise: str = "saving it again") -> folders.Files | None:
    try:
        return folders.read_folder(folder)
    except folders.CorruptedError as error:
        if folder.exists():
            say(f"{error}; {otherwise}")
        return None


def open_run(folder: Path) -> Run | None:
    """The run in this folder, or None where there is none. Raises UserError where it cannot be read."""
    path = folder / "run.json"
    with folders.plain_errors(path, "read"):
        if not path.is_file():
            return None
        data = path.read_bytes()
    try:
        return Run(folder, _read_about(data, str(path)))
    except folders.CorruptedError as error:
        raise folders.CorruptedError(f"{error}; move {folder} away to train that run again") from None


def _read_about(data: bytes, name: str) -> dict:
    """What `run.json` says, with all in it that others rely on. Raises CorruptedError where it is not."""
    about = read_sealed_json(data, name)
    wanted = {"kind": str, "identity": str, "settings": dict, "settings.test_mode": bool, "settings.dataset": str}
    if about.get("kind") == "lora":
        wanted |= {"base": dict, "base.run": str}
    for key, kind in wanted.items():
        place, _, entry = key.rpartition(".")
        value = (about[place] if place else about).get(entry)
        if not isinstance(value, kind) or key == "kind" and value not in ARTIFACTS:
            raise folders.CorruptedError(f"{name} is corrupted: {key} is {value!r}")
    return about


def all_runs(root: Path, warn: bool = True) -> list[Run]:
    """Every run below `root`, by when it finished or else began, the newest last; drafts are none.

    warn: whether a run that cannot be read, which is left out, is named on stderr."""
    runs = []
    with folders.plain_errors(root, "read"):
        paths = sorted(root.iterdir()) if root.is_dir() else []
    for folder in (path for path in paths if not path.name.startswith(".")):
        try:
            runs += [run] if (run := open_run(folder)) else []
        except UserError as error:
            if warn:
                say(f"{error}; leaving that run out")
    return sorted(runs, key=lambda run: run.written)


def find_run(root: Path, name: str) -> Run:
    """The run of that name (or at that path). Raises UsageError with the nearest name and a few others."""
    for folder in (root / name, Path(name)):
        if run := open_run(folder):
            return run
    raise UsageError(f"there is no run {name!r} in {root}; {suggest(name, all_runs(root), 'runs')}")


def suggest(name: str, runs: list[Run], what: str) -> str:
    """The run whose name is nearest to `name`, and the newest few of the others, in words."""
    names = [run.name for run in runs]
    near = difflib.get_close_matches(name, names, 1)
    names = [other for other in names if other not in near]
    more = f", and {len(names) - 3} more: {command_line('adapters.py', 'list')}" if len(names) > 3 else ""
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}{what} there: {', '.join(names[-3:]) or 'none yet'}{more}"


def identity_of(about: dict) -> str:
    """A short hash of what defines a run's result: equal for runs that would compute the same."""
    return sha256(json.dumps(about, sort_keys=True).encode())[:12]


def claim(
    root: Path,
    plain_name: str,
    chosen_name: str,
    about: dict,
    fresh: bool,
    identity: Callable[[dict], str] = lambda about: about["identity"],
) -> Run:
    """The folder for a run of this identity: a new one, or the one where it stands already, whatever its name.

    The plain name gets a short hash where it is taken by other settings; a chosen name that is taken is an error.
    With `fresh`, a run that stands there is moved aside first, never deleted. identity: of what `run.json` says.
    """
    own = about["identity"]
    names = [chosen_name] if chosen_name else [plain_name, f"{plain_name}-{own[:6]}", f"{plain_name}-{own}"]
    if not chosen_name:
        same = [run for run in all_runs(root, warn=False) if not run.aside and identity(run.metadata) == own]
        same.sort(key=lambda run: (not run.finished, run.name != plain_name))
        names = [*(run.name for run in same[:1]), *names]
    for folder in (root / name for name in names):
        there = open_run(folder)
        if there is None or identity(there.metadata) == own or (chosen_name and fresh):
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
        folders.write_file(folder / "run.json", to_sealed_json(about))
    elif there.finished:
        there.tidy()
    return there or Run(folder, about)


def _move_aside(run: Run) -> None:
    with RunLock(run.folder):  # a process that trains it would go on in the folder that takes its name
        pass
    there = all_runs(run.folder.parent, warn=False)
    adapters = [other.name for other in there if other.kind == "lora" and other.metadata["base"]["run"] == run.name]
    aside = next(p for i in range(1, 10**6) if not (p := run.folder.with_name(f"{run.name}.old{i}")).exists())
    if adapters:
        told = "stays usable: its base" if len(adapters) == 1 else "stay usable: their base"
        say(f"FRESH=True moves the base of {', '.join(adapters)}, which {told} is then {aside.name}")
    folders.publish_folder(run.folder, aside)
    say(f"FRESH=True: the run that was in {run.folder} is now in {aside}")
