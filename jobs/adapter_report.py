"""What there is to see of adapters: the list of them, the modules of one, two side by side."""

from __future__ import annotations

from pathlib import Path

from jobs.adapters import Adapted, base_name, read_adapter, texts_of
from lora.adapter import Adapter
from lora.combine import Size, diff, size, target_paths
from lora.variants import VARIANTS
from runtime import report
from runtime.checkpoint import Run, all_runs
from runtime.errors import UserError

HEADS = ("run", "kind", "base", "variant", "rank", "targets", "trained on", "val loss", "size", "state")


def ranks_in_words(adapter: Adapter) -> str:
    """An adapter's rank, or its lowest and highest, as in `2-8`."""
    ranks = sorted({adapter.config.rank_at(path) for path in adapter.targets()})
    return "-".join(map(str, ranks if len(ranks) < 3 else (ranks[0], ranks[-1]))) or "none"


def _row(run: Run) -> tuple[str, ...]:
    """One run; what cannot be read of it is told in its last column, and hides no other run."""
    try:
        loss = run.result.get("val_loss")
        texts = ", ".join(Path(text).name for text in texts_of(run))
        about = (f"{loss:.4f}" if isinstance(loss, float) else "", report.size(sum(map(len, run.read().values()))))
        state = "" if run.finished else "unfinished"
        if run.kind != "lora":
            return (run.name, run.kind, base_name(run) if run.kind == "full" else "", "", "", "", texts, *about, state)
        adapter = read_adapter(run)
        config = adapter.config
        made_of = (base_name(run), config.variant, ranks_in_words(adapter), _short(config.targets))
        return (run.name, run.kind, *made_of, texts, *about, state)
    except UserError as error:
        return (run.name, run.kind, *[""] * (len(HEADS) - 3), str(error))


def _short(text: str) -> str:
    return text if len(text) <= 30 else text[:27] + "..."


def list_runs(root: Path) -> str:
    """A table of every run in the folder, the newest last."""
    rows = [_row(run) for run in all_runs(root)]
    if not rows:
        raise UserError(f"there is no run in {root} yet; train one with: python training.py")
    return report.table([HEADS, *rows])


def sizes(adapted: Adapted) -> dict[str, Size]:
    """How large the change of each module is."""
    base = adapted.base.tensors
    return {path: size(adapted.adapter, path, base) for path in target_paths([adapted.adapter], base)}


def inspected(adapted: Adapted, found: dict[str, Size]) -> str:
    """Facts of an adapter, and a table of its modules."""
    adapter, base = adapted.adapter, adapted.base.tensors
    rows = [("module", "rank", "alpha", "|dW|", "|dW|/|W|", "effective rank")]
    for path, (norm, relative, effective) in found.items():
        rank, alpha = f"{adapter.config.rank_at(path)}", f"{adapter.config.alpha_at(path):g}"
        alpha = "" if "alpha" in VARIANTS[adapter.config.variant].unread else alpha
        rows.append((path, rank, alpha, f"{norm:.3f}", f"{relative:.4f}", f"{effective:.2f}"))
    for path, key, copy in adapter.copies():
        own = base[f"{path}.{key}"]
        change, whole = (copy - own).norm().item(), own.norm().item()
        rows.append((f"{path}.{key}", "", "", f"{change:.3f}", f"{change / whole:.4f}" if whole else "", ""))
    facts = {"base": adapted.base.run.name, "variant": adapter.config.variant, "targets": adapter.config.targets}
    facts |= {key: text for key, text in adapter.facts.items() if key != "base"} | {"fingerprint": adapter.sha256}
    lines = [f"{key.replace('_', ' ')}: {text}" for key, text in facts.items()]
    note = "|.| is the Frobenius norm; effective rank: exp of the entropy of the singular values' shares of their sum."
    return "\n".join([*lines, "", report.table(rows), note])


def compared(one: Adapted, other: Adapted) -> str:
    """The cosine of two adapters' changes, module by module."""
    rows = [("module", "cosine")]
    for path, value in diff(one.adapter, other.adapter, one.base.tensors).items():
        missing = [side.run.name for side in (one, other) if path not in side.adapter.targets()]
        rows.append((path, f"{value:+.4f}" if value is not None else f"not in {missing[0]}" if missing else "zero"))
    return report.table(rows)
