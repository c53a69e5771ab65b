"""A base that was trained elsewhere: a Hugging Face folder, or a name on their hub, in the place of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from models.files import CONFIG
from models.pretrained.fingerprints import known_fingerprint
from models.stored import INDEX, WEIGHTS
from runtime.errors import UserError
from runtime.hub.fetching import fetch_config, fetch_model
from runtime.settings.config import is_hub_name
from runtime.storage import folders
from runtime.storage.encoding import read_json
from runtime.storage.runs import Run, find_run, open_run

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "tf_model.h5")
SMALL_FILES = r".*\.(json|jinja|txt|model)"


class Pretrained(Run):
    """A pretrained model's folder as a base: it is finished, and nothing is known of what it was trained on.

    hub: its name on the hub, or empty; of such a model only config.json is there until it is read.
    """

    def __init__(self, folder: Path, hub: str = "") -> None:
        settings: dict[str, Any] = {"dataset": "", "test_mode": False}
        super().__init__(folder, {"kind": "base", "settings": settings, "identity": "", "hub": hub})

    @property
    def name(self) -> str:
        """What it is called on the hub or else its folder, without what stands before the last slash."""
        return (self.metadata["hub"] or self.folder.resolve().name).rpartition("/")[2]

    @property
    def artifact(self) -> Path:
        return self.folder

    @property
    def finished(self) -> bool:
        return True

    def read(self) -> folders.Files:
        """Its files: config, weights and what belongs to its tokenizer. Raises UserError where no weights are there,
        and where the hub cannot give them."""
        if hub := self.metadata["hub"]:
            object.__setattr__(self, "folder", fetch_model(hub))  # another, if the hub has another version by now
        with folders.plain_errors(self.folder, "read"):
            there = {path.name: path for path in sorted(self.folder.iterdir()) if path.is_file()}
            names = there.keys()
            if not names & {WEIGHTS, INDEX}:
                pickles = [name for name in PICKLES if name in names]
                why = f"only {pickles[0]}, a pickle, which is never read here" if pickles else f"no {WEIGHTS}"
                raise UserError(f"{self.folder} has {why}; save the model with transformers: save_pretrained(folder)")
            return {name: folders.read_content(path) for name, path in there.items() if self._is_read(name, names)}

    def fingerprint(self, files: folders.Files, compute: Callable[[], str]) -> str:
        """The fingerprint of the model in these files, computed or kept from an earlier time."""
        paths = [self.folder / name for name in files if name == CONFIG or name.endswith(".safetensors")]
        return known_fingerprint(paths, compute)

    def _is_read(self, name: str, names: Collection[str]) -> bool:
        """Whether a file belongs to the model: small ones, and the weights, of which a folder may have two forms."""
        if name.endswith(".safetensors"):
            return name == WEIGHTS if WEIGHTS in names else bool(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))
        return bool(re.fullmatch(SMALL_FILES, name)) and not (name == INDEX and WEIGHTS in names)


def open_pretrained(folder: Path) -> Pretrained | None:
    """A Hugging Face folder as a base; None where there is none. Raises CorruptedError for a torn config.json."""
    path = folder / CONFIG
    if not path.is_file() or (folder / "run.json").exists():
        return None
    with folders.plain_errors(path, "read"):
        values = read_json(path.read_bytes(), str(path))
    return Pretrained(folder) if "model_type" in values or "architectures" in values else None


def find_source(root: Path, name: str) -> Run:
    """The run of that name or path, else the Hugging Face folder there, else the model of that name on the hub.

    Of one on the hub only config.json is fetched, and the rest when it is read. Raises UsageError where there is none
    of these, UserError where the hub cannot give it.
    """
    for folder in (root / name, Path(name)):
        if run := open_run(folder) or open_pretrained(folder):
            return run
    if is_hub_name(name) and not Path(name).exists():
        return Pretrained(fetch_config(name), name)
    return find_run(root, name)
