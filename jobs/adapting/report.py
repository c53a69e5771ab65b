"""What there is to see of adapters: the list of them, the modules of one, two side by side."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path

from jobs.adapting.adapted import Adapted, texts_of
from jobs.runs.family import Family
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.combine import DeltaSize, all_targets, cosines, delta_size
from lora.variants.registry import VARIANTS
from models.pretrained.families import family_with
from models.transformer import presets_of_run
from runtime import report
from runtime.errors import UserError
from runtime.settings.config import has_records
from runtime.start import command_line
from runtime.storage.runs import Run, all_runs

HEADS = ("run", "kind", "targets", "text", "tokens", "steps", "loss", "bits", "finished")


def ranks_in_words(adapter: Adapter) -> str:
    """An adapter's rank, or its lowest and highest, as in `2-8`."""
    ranks = sorted({adapter.config.rank_at(path) for path in adapter.targets()})
    return "-".join(map(str, ranks if len(ranks) < 3 else (ranks[0], ranks[-1]))) or "none"


def _row(run: Run, tokens: str, depth: int) -> tuple[str, ...]:
    """One run. What cannot be read of it stands in its last column, and hides no other run."""
    name, empty = "  " * depth + run.name, [""] * (len(HEADS) - 3)
    if not run.finished and not run.saved("best"):
        return (name, run.kind, *empty, "nothing saved")
    try:
        result, kind, targets = run.result, run.kind, ""
        files = run.read()
        if run.kind == "lora":
            adapter = adapter_files.from_files(files, str(run.artifact), family_with)
            kind, targets = f"{adapter.config.variant} {ranks_in_words(adapter)}", targets_in_words(adapter, run)
        steps = result.get("step") or max((step for step, _ in run.saved("step")), default="")
        loss = result.get("val_loss")
        per_character = tokens == "char" and not any(map(has_records, texts_of(run)))
        bits = result.get("bits_per_character") or (loss / math.log(2) if loss and per_character else None)
        losses = (f"{value:.4f}" if isinstance(value, float) else "" for value in (loss, bits))
        texts = ",".join(Path(text).name for text in texts_of(run))
        finished = f"{datetime.fromtimestamp(run.written):%Y-%m-%d}" if run.finished else "unfinished"
        return (name, kind, _short(targets), _short(texts), tokens, str(steps), *losses, finished)
    except UserError as error:
        return (name, run.kind, *empty, str(error))


def targets_in_words(adapter: Adapter, run: Run) -> str:
    """What an adapter changes: the name of a preset where it is one."""
    names = set(adapter.target_modules())
    presets = presets_of_run(run.metadata).items()
    return next((preset for preset, members in presets if set(members) == names), adapter.config.targets)


def _short(text: str) -> str:
    return text if len(text) <= 11 else text[:8] + "..."


def list_runs(root: Path) -> str:
    """A table of every run in the folder: below each base what was trained on it, and the newest last."""
    if not (runs := all_runs(root)):
        raise UserError(f"there is no run in {root} yet; train one with: {command_line('training.py')}")
    family = Family.of(runs)
    gone = {orphan.metadata["base"]["run"]: None for orphan in family.orphans()}
    rows = [HEADS, *_rows_below(family, None, 0)]
    for base in gone:
        rows.append((f"(missing base: {base})", *[""] * (len(HEADS) - 1)))
        rows += [_row(run, "", 1) for run in family.orphans() if run.metadata["base"]["run"] == base]
    return report.table(rows)


def _rows_below(family: Family, base: Run | None, depth: int) -> list[tuple[str, ...]]:
    rows = []
    for run in family.trained_on(base):
        rows += [_row(run, family.tokenizers.get(run.metadata.get("tokenizer_sha256"), ""), depth)]
        rows += _rows_below(family, run, depth + 1)
    return rows


def sizes(adapted: Adapted) -> dict[str, DeltaSize]:
    """How large the change of each module is."""
    base = adapted.base.tensors
    return {path: delta_size(adapted.adapter, path, base) for path in all_targets([adapted.adapter], base)}


def inspected(adapted: Adapted, found: dict[str, DeltaSize]) -> str:
    """Facts of an adapter, and a table of its modules."""
    adapter, base = adapted.adapter, adapted.base.tensors
    rows = [("module", "rank", "alpha", "|dW|", "|dW|/|W|", "effective rank")]
    for path, (norm, relative, effective) in found.items():
        rank, alpha = f"{adapter.config.rank_at(path)}", f"{adapter.config.alpha_at(path):g}"
        alpha = "" if "alpha" in VARIANTS[adapter.config.variant].ignored_fields else alpha
        rows.append((path, rank, alpha, f"{norm:.3f}", f"{relative:.4f}", f"{effective:.2f}"))
    for path, key, copy in adapter.trained_copies():
        own = base[f"{path}.{key}"]
        change, whole = (copy - own).norm().item(), own.norm().item()
        rows.append((f"{path}.{key}", "", "", f"{change:.3f}", f"{change / whole:.4f}" if whole else "", ""))
    metadata = {"base": adapted.base.run.name, "variant": adapter.config.variant, "targets": adapter.config.targets}
    metadata |= {key: text for key, text in adapter.metadata.items() if key != "base"} | {"fingerprint": adapter.sha256}
    lines = [f"{key.replace('_', ' ')}: {text}" for key, text in metadata.items()]
    note = "|.| is the Frobenius norm; effective rank: exp of the entropy of the singular values' shares of their sum."
    return "\n".join([*lines, "", report.table(rows), note])


def compared(one: Adapted, other: Adapted) -> str:
    """The cosine of two adapters' changes, module by module."""
    rows = [("module", "cosine")]
    for path, value in cosines(one.adapter, other.adapter, one.base.tensors).items():
        missing = [side.run.name for side in (one, other) if path not in side.adapter.targets()]
        rows.append((path, f"{value:+.4f}" if value is not None else f"not in {missing[0]}" if missing else "zero"))
    return report.table(rows)
