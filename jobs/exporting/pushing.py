"""A run pushed to the Hugging Face hub: what was exported and verified, or an adapter as it is while it trains."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from jobs.adapting.adapted import read_adapter
from jobs.exporting.gguf.ollama import modelfile_of
from jobs.exporting.held_out import held_out_of
from jobs.exporting.hugging_face import adapter as hf_adapter
from jobs.exporting.hugging_face import folder as hf_folder
from jobs.exporting.leaving import CARD, whole_card, without_paths
from jobs.exporting.opening import open_adapter, open_whole
from jobs.runs.job import Job
from runtime import report
from runtime.console import say
from runtime.errors import UserError
from runtime.hub.background import Newest
from runtime.hub.pushing import Target, UnreachableError, push
from runtime.processes.world import world
from runtime.settings.config import Settings
from runtime.start import command_line
from runtime.storage.folders import MANIFEST
from runtime.storage.runs import Run


def push_exported(target: Target, run: Run, out: Path) -> str:
    """Push what was exported to `out`, with a card, and return its address. Raises UserError in one line."""
    if out.is_dir():
        paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != MANIFEST]
        files: dict[str, Path | bytes] = {path.relative_to(out).as_posix(): path for path in paths}
    else:
        files = {path.name: path for path in (out, modelfile_of(out)) if path.is_file()}
    if CARD not in files:
        base = (run.metadata.get("base") or {}).get("sha256", "")
        files[CARD] = whole_card(run, base, out.suffix[1:], [f"llama-cli -hf {target.name}"])
    return _push(target, files, run.name)


def push_run(root: Path, run: Run, target: Target, data_dir: Path) -> str:
    """Export a finished run and push it, an adapter by itself; returns its address. Raises UserError in one line."""
    say(f"Exporting {run.name} for {target.name}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / run.name
        if run.kind == "lora":
            hf_adapter.export_folder(open_adapter(root, str(run.folder.absolute())), out, place=target.name)
        else:
            opened = open_whole(root, str(run.folder.absolute()))
            hf_folder.export_folder(opened, held_out_of(opened, data_dir), out, place=target.name)
        return push_exported(target, run, out)


def _push(target: Target, files: Mapping[str, Path | bytes], name: str) -> str:
    size = sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())
    say(f"Pushing {len(files)} files ({report.size(size)}) to {target.name}")
    return push(target, files, name)


# --- of a run that trains -------------------------------------------------------------------------------------------


class Pushing:
    """What PUSH_TO_HUB asks of a training run; nothing where it is empty."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.uploads = settings, Newest()

    def target(self, run: str = "") -> Target:
        """Where the run goes. run: its name, once it has one that export.py finds."""
        s = self.settings
        public = () if s.push_private else ("--public",)
        again = command_line("export.py", run, "--push", s.push_to_hub, *public) if run else ""
        return Target(s.push_to_hub, s.push_private, again)

    @property
    def saves(self) -> bool:
        """Whether what is saved on the way is pushed as well."""
        return bool(self.settings.push_to_hub) and self.settings.push_strategy == "every_save"

    def check(self) -> None:
        """Raises UserError where it is known already that nothing can be pushed; says so where that may change."""
        if not self.settings.push_to_hub:
            return
        if not self.settings.use_lora:
            hf_folder.check_packages()
            if self.saves:
                say("PUSH_STRATEGY=every_save is for adapters; a whole model is pushed at the end")
        try:
            self.target().check()
        except UnreachableError as error:
            say(f"warning: {error}; training all the same, and pushing at the end")

    def save(self, job: Job, run: Run, step: int, loss: float) -> None:
        """With PUSH_STRATEGY=every_save, push the best adapter so far, just saved, while training goes on."""
        if not (self.saves and job.kind == "lora" and world().leads):
            return
        target, notes = self.target(), {"steps": f"{step:,}", "validation_loss": f"{loss:.4f}"}
        try:
            written = hf_adapter.outward(read_adapter(run), job.base, notes, target.name)
            files = {name: bytes(content) for name, content in without_paths(run.read() | written).items()}
        except UserError as error:
            say(f"step {step} is not pushed: {error}")
            return
        self.uploads.offer(lambda: _push_save(target, files, step))

    def end(self, run: Run) -> None:
        """Push the finished run. Where that fails it is said, with the command that tries again; the run is whole."""
        if not self.settings.push_to_hub:
            return
        world().leave()  # the others need not wait for an upload
        if not world().leads:
            return
        target, root = self.target(run.name), Path(self.settings.checkpoints_dir)
        data_dir = Path(self.settings.data_dir)
        try:
            if self.uploads.busy:
                say(f"Waiting for a save that is on its way to {target.name}")
            self.uploads.end()
            print(f"   On the hub: {push_run(root, run, target, data_dir)}", flush=True)
        except UserError as error:
            told = str(error) if target.again in str(error) else f"{error}{target}"
            say(f"{run.name} is whole, and was not pushed: {told}")
        except KeyboardInterrupt:
            say(f"\n{run.name} is whole, and was not pushed; to push it: {target.again}")
            raise


def _push_save(target: Target, files: Mapping[str, bytes], step: int) -> None:
    try:
        push(target, files, f"step {step}", quiet=True)
    except Exception as error:  # nothing that goes wrong here may stop the training
        why = str(error) if isinstance(error, UserError) else type(error).__name__
        say(f"step {step} was not pushed: {why}; the next save is")
