"""Everything that can be wrong with saved files, found without putting them to use, and all of it named at once."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from data.tokenizers import Tokenizer
from jobs.runs.base import TOKENIZER, Base, base_of, tokenizer_in
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.variants.registry import VARIANTS
from models import files as model_files
from models.pretrained.families import family_with
from models.pretrained.source import open_pretrained
from models.stored import WEIGHTS
from models.transformer import Transformer
from runtime.errors import UserError
from runtime.settings.config import NAME
from runtime.storage import folders
from runtime.storage.content import sha256
from runtime.storage.runs import Run, open_run
from runtime.storage.tensors import unpack

READ = (adapter_files.CONFIG, adapter_files.TENSORS, model_files.CONFIG, WEIGHTS, TOKENIZER)
UNREADABLE = ("adapter_model.bin", "pytorch_model.bin")


class Checkup:
    """The problems found so far, and notes on what could not be compared."""

    def __init__(self, root: Path, base: str = "") -> None:
        self.root, self.base = root, base
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.checked: list[str] = []

    def path(self, path: Path) -> Checkup:
        """Check a run, an adapter's or a model's folder, or a file of one. Raises UserError where it is neither."""
        if path.is_file():
            if path.name in READ and (path.parent / folders.MANIFEST).exists():
                return self.path(path.parent)
            return self.loose_file(path)
        if (path / "run.json").is_file():
            return self.run(path)
        there = {name.name for name in path.iterdir()} if path.is_dir() else set()
        if there & {adapter_files.CONFIG, adapter_files.TENSORS, *UNREADABLE[:1]}:
            self.adapter(path, self.base)
        elif there & {model_files.CONFIG, WEIGHTS}:
            self.model(path)
        else:
            raise UserError(f"{path} is no run, adapter or model: there is no file of theirs in it")
        return self

    def run(self, folder: Path) -> Checkup:
        """A run: what it says of itself, and each folder of weights in it."""
        run = self.attempt(lambda: open_run(folder))
        if run and self.attempt(lambda: run.result) is not None:
            there = [name for name in ("run.json", "result.json") if (folder / name).exists()]
            self.checked.append(f"{folder.name}: {', '.join(there)}")
        before = len(self.problems) + len(self.checked)
        for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
            if name == "adapter" or (name.startswith("best-") and run and run.kind == "lora"):
                self.adapter(folder / name, self.base, run)
            elif name == "model" or name.startswith("best-"):
                self.model(folder / name)
        if len(self.problems) + len(self.checked) == before:
            self.problems.append(f"{folder} has no weights: nothing of it can be used before it has saved some")
        return self

    def attempt(self, read):
        """What `read` returns, or None where it raises, which is then a problem."""
        try:
            return read()
        except UserError as error:
            self.problems.append(str(error))
            return None

    def files(self, folder: Path) -> folders.Files:
        """A folder's files, whatever their state; each that is not as its manifest says is a problem."""
        self.problems += corrupted_files(folder)
        if not (folder / folders.MANIFEST).exists():
            self.notes.append(f"{folder} has no manifest: whether its bytes are those that were saved is not known")
        pickled = [name for name in UNREADABLE if (folder / name).exists()]
        self.problems += [
            f"{folder / name} is a pickle, which is never read here; save safetensors" for name in pickled
        ]
        if pretrained := self.attempt(lambda: open_pretrained(folder)):
            return self.attempt(pretrained.read) or {}
        with folders.plain_errors(folder, "read"):
            return {name: folders.read_content(path) for name in READ if (path := folder / name).is_file()}

    def adapter(self, folder: Path, base_name: str, run: Run | None = None) -> None:
        """An adapter's files, and how they fit the base that is named, or that they name."""
        files = self.files(folder)
        adapter = self.attempt(lambda: adapter_files.from_files(files, str(folder), family_with))
        if adapter is None:
            return
        base_name = base_name or (run.metadata["base"]["run"] if run else adapter.metadata.get("base", ""))
        named = isinstance(base_name, str) and re.fullmatch(NAME, base_name)
        there = (named and (self.root / base_name / "run.json").exists()) or (self.base and not named)
        base = self.attempt(lambda: Base.open(self.root, base_name)) if there else None
        if base is None and run and not there and not self.base:
            with suppress(UserError):
                base = base_of(self.root, run)  # in another folder, or under another name
        if base is None:
            self.notes.append(f"{folder}: its base is not here, so its tensors are compared with its config alone")
        found = base.problems(adapter) if base else flaws(adapter)
        self.problems += [f"{folder}: {problem}" for problem in found]
        self.checked.append(f"{folder}: {sum(map(len, adapter.tensors.values()))} tensors")

    def model(self, folder: Path) -> None:
        """A model's files: shapes, values, tokenizer."""
        files = self.files(folder)
        model = self.attempt(lambda: model_files.from_files(files, str(folder)))
        if TOKENIZER in files:
            tokenizer = self.attempt(lambda: tokenizer_in(files, str(folder)))
            if model and tokenizer and not _go_together(tokenizer, model):
                sizes = f"{tokenizer.vocab_size} tokens, and its model {model.config.vocab_size}"
                self.problems.append(f"{folder}: its tokenizer has {sizes}")
        else:
            self.problems.append(f"{folder}: {TOKENIZER} is missing")
        if model:
            tensors = dict(model.named_parameters())
            self.problems += [f"{folder}: {problem}" for problem in not_finite(tensors)]
            self.checked.append(f"{folder}: {len(tensors)} tensors")

    def loose_file(self, path: Path) -> Checkup:
        """A safetensors file by itself: whether it is whole and its values are finite."""
        with folders.plain_errors(path, "read"):
            data = folders.read_content(path)
        if (tensors := self.attempt(lambda: unpack(data, str(path)))) is not None:
            self.problems += [f"{path}: {problem}" for problem in not_finite(tensors)]
            self.checked.append(f"{path}: {len(tensors)} tensors")
            self.notes.append(f"{path} is checked by itself: its folder would tell more")
        return self


def _go_together(tokenizer: Tokenizer, model: Transformer) -> bool:
    """Whether a model has as many tokens as its tokenizer; a pretrained one may have more, for even sizes."""
    spare = model.config.vocab_size - tokenizer.vocab_size
    return spare >= 0 if tokenizer.kind == "pretrained" else spare == 0


def corrupted_files(folder: Path) -> list[str]:
    """Every file that is not as the folder's manifest says; none for a folder without a manifest."""
    if not (folder / folders.MANIFEST).exists():
        return []
    try:
        folders.read_folder(folder)
        return []
    except folders.CorruptedError as error:
        first = str(error)
    try:
        table = json.loads((folder / folders.MANIFEST).read_bytes())["files"]
        found = {folder / name: entry["sha256"] for name, entry in table.items() if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [first]
    problems = [f"{path} is missing" for path in found if not path.is_file()]
    wrong = [path for path, digest in found.items() if path.is_file() and sha256(folders.read_content(path)) != digest]
    return problems + [f"{path} is corrupted: its checksum is not the one that was saved" for path in wrong] or [first]


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Which tensors have values that are not finite."""
    return [f"{name} has values that are not finite" for name, t in tensors.items() if not t.isfinite().all()]


def flaws(adapter: Adapter) -> list[str]:
    """What is wrong with an adapter by itself: factors that do not go together, values that are not finite."""
    problems = []
    for path in adapter.targets():
        group, rank = adapter.tensors[path], adapter.config.rank_at(path)
        for name, sizes in VARIANTS[adapter.config.variant].shapes.items():
            wanted = [rank if size == "rank" else size for size in sizes]
            if name not in group:
                problems.append(f"{path}.{name} is missing")
            elif not _fits(shape := tuple(group[name].shape), wanted):
                problems.append(f"{path}.{name} is {shape}, not ({', '.join(map(str, wanted))})")
    return problems + not_finite(adapter.named_tensors())


def _fits(shape: tuple[int, ...], wanted: list[int | str]) -> bool:
    """Whether a shape is the one that is wanted, as far as that is known."""
    return len(shape) == len(wanted) and all(
        size in (found, "in", "out") for found, size in zip(shape, wanted, strict=True)
    )
