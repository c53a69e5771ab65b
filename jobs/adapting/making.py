"""Runs out of adapters: merged into a base, combined with each other, brought in from PEFT's folders."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from data.corpora import CORPORA
from data.pretrained_tokenizer import TEMPLATE
from jobs.adapting.adapted import Adapted, Base, metadata_of_made, publish, shared_template, texts_of
from jobs.exporting.opening import LENGTH, ROWS, logits
from jobs.exporting.verifying import Difference
from jobs.runs.job import to_adapter_files, to_model_files
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.attach import detach
from lora.combine import Combined, combine
from lora.merge import MergedTensors
from models import files as model_files
from models.files import form_of
from models.pretrained.families import family_with
from models.stored import StoredTensors
from runtime.device import Machine
from runtime.errors import UserError, join_problems
from runtime.storage import folders
from runtime.storage.runs import Run
from runtime.training.batch import Batch
from runtime.training.steps import evaluate

TOLERANCE = 1e-4  # of the largest logit: sums in another order differ by less than a tenth of it in fp32


def dense_bases(adapted: Adapted) -> dict[str, Adapted]:
    """The same adapter on dense weights instead of those in 4 or 8 bits that it was trained on: `dequantized`, the same
    values, and `original`, those that they were made of, where the base's files have them."""
    run, form = adapted.base.run, form_of(adapted.base.model)
    found = {"dequantized": Base.of(run, form=form), "original": Base.of(run)}
    model_files.dequantize(found["dequantized"].model)
    return {name: replace(adapted, base=base) for name, base in found.items() if form_of(base.model) == "none"}


def loss_with(adapted: Adapted, windows: list[Batch], machine: Machine) -> float:
    """The loss of base and adapter."""
    model = adapted.base.model.to(machine.device)
    adapted.adapter.attach_to(model, base_sha256=adapted.base.sha256)
    found = evaluate(model, windows, machine)
    detach(model, "default")
    model.to("cpu")
    return found


def merge_run(adapted: Adapted, folder: Path, window: Batch, **how: str) -> tuple[Run, Difference]:
    """A run that needs no adapter, in the format and the dtype of its base, which is dense, and how far its logits are
    off from base and adapter on some rows of the window. how: what its run.json says of it besides.

    Every tensor is merged when it is written, and read back. Raises UserError where one is not as it was written, and
    where logits are off by more than TOLERANCE although no value was rounded; there is then no new run.
    """
    folders.check_free(folder)
    model, adapter, base = adapted.base.model.eval(), adapted.adapter, adapted.base
    texts, origin = texts_of(adapted.run), {"how": "merge", "adapter": adapted.run.name, "sha256": adapter.sha256} | how
    about = metadata_of_made(folder.parent, "full", base, adapter, texts, origin) | shared_template([adapted.run])
    adapter.attach_to(model, base_sha256=base.sha256)
    probe, tensors = window.tokens[:ROWS, :LENGTH], MergedTensors(model)
    files = to_model_files(model, base.tokenizer, base, tensors) | _written(about)
    expected, found = logits(model, probe), None

    def verify(run: Run) -> None:
        nonlocal found
        written, where = run.read(), str(run.artifact)
        _check_equal(model_files.stored_tensors(written, where, model.config), tensors)
        detach(model, "default")
        model_files.load_weights(model, written, where)
        limit = math.inf if tensors.rounded else TOLERANCE
        found = Difference.between("the merged weights", logits(model, probe), expected, limit)

    result = {key: value for key, value in adapted.run.result.items() if key in ("val_loss", "bits_per_character")}
    return publish(folder, about, files, result, verify), found


def _check_equal(stored: StoredTensors, tensors: MergedTensors) -> None:
    """Raises UserError where a tensor is not in the files as it was merged."""
    if wrong := [name for name in tensors if not torch.equal(stored[name], tensors[name])]:
        raise UserError(f"{join_problems(wrong)}: not in the files as it was merged; nothing was saved")


def quantize_run(base: Base, folder: Path) -> Run:
    """A run with a base's weights in the form in which it was opened, nf4 or int8."""
    folders.check_free(folder)
    form = form_of(base.model)
    about = metadata_of_made(folder.parent, "full", base, None, [], {"how": "quantize", "form": form})
    return publish(folder, about, to_model_files(base.model, base.tokenizer, base), {})


def combine_runs(parts: list[Adapted], weights: list[float], method: str, rank: int | None, folder: Path) -> Combined:
    """A new LoRA run whose adapter is the weighted sum of others. Raises as `lora.combine.combine` does."""
    folders.check_free(folder)
    base, adapters = parts[0].base, [part.adapter for part in parts]
    made = combine(adapters, weights, base.tensors, method, rank, base.sha256)
    terms = [(weight, part.run.name) for weight, part in zip(weights, parts, strict=True)]
    told = " + ".join(f"{weight:g} x {name}" for weight, name in terms)
    origin = {"how": "combine", "method": method, "rank": rank, "sum": terms}
    origin["sha256"] = [adapter.sha256 for adapter in adapters]
    texts = list(dict.fromkeys(text for part in parts for text in texts_of(part.run)))
    notes = {"combined": f"{told}, by {method}", "trained on": ", ".join(texts) or "not known"}
    if method == "svd":
        notes["relative error of svd"] = f"{made.error:.3g}"
    about = metadata_of_made(folder.parent, "lora", base, made.adapter, texts, origin)
    about |= shared_template([part.run for part in parts])
    publish(folder, about, to_adapter_files(made.adapter, base, notes) | _written(about), {})
    return made


def _written(about: dict) -> folders.Files:
    """The template that a run says it was trained with, as a file."""
    return {TEMPLATE: about["template"].encode()} if "template" in about else {}


def import_folder(source: Path, base: Base, folder: Path) -> Adapter:
    """A new LoRA run from an adapter folder, PEFT's or ours.

    The base is taken on trust where the folder does not tell its fingerprint. Raises UserError that names whatever is
    not understood or does not fit.
    """
    folders.check_free(folder)
    adapter = adapter_files.load_adapter(source, family_with)
    problems = base.problems(adapter)
    if base.family and "base_sha256" not in adapter.metadata:
        problems = _other_base(adapter, base) + problems
    if problems:
        raise UserError(f"{source} does not fit {base.run.name}: {join_problems(problems)}")
    texts = [text for text in (adapter.metadata.get("dataset"),) if text in CORPORA]
    origin = {"how": "import", "sha256": adapter.sha256}
    files = to_adapter_files(adapter, base, {"imported": "from an adapter folder"})
    publish(folder, metadata_of_made(folder.parent, "lora", base, adapter, texts, origin), files, {})
    return adapter


def _other_base(adapter: Adapter, base: Base) -> list[str]:
    """What PEFT says of the base, where that is another's name; of its weights it says nothing."""
    told = adapter.metadata.get("base_path", "").rstrip("/").rpartition("/")[2]
    if not told or told == base.run.name:
        return []
    return [
        f"base_model_name_or_path in its adapter_config.json is {told!r}; change it there if they are the same model"
    ]
