"""What a comparison came to: its rows over several seeds, as a table, and in one line."""

from __future__ import annotations

import statistics
from typing import Any

from runtime import report

Rows = list[dict[str, Any]]


def over_seeds(runs: list[Rows]) -> Rows:
    """One row a method: medians of what was measured with each seed, the range of its losses, its part of full
    fine-tuning's time a step; curves and file sizes are those of the first seed. The phases of a step add up to it."""
    ratios = [[row["milliseconds"]["step"] / rows[0]["milliseconds"]["step"] for row in rows] for rows in runs]
    merged = []
    for i, same in enumerate(zip(*runs, strict=True)):
        losses = [row["loss_at_equal_steps"] for row in same]
        extra = {"step_over_full": statistics.median(ratio[i] for ratio in ratios), "losses": losses}
        merged.append(_medians(same) | extra)
    return merged


def _medians(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """The first row, each measured number in it replaced by the median of all."""
    found = dict(rows[0])
    for name, value in found.items():
        if isinstance(value, float):
            found[name] = statistics.median(row[name] for row in rows)
        elif name == "milliseconds":
            found[name] = _adding_up(_medians(tuple(row[name] for row in rows)))
    return found


def _adding_up(milliseconds: dict[str, float]) -> dict[str, float]:
    """The phases scaled to add up to the step: medians of the parts do not add up to the median of the whole."""
    whole = milliseconds["step"]
    total = sum(milliseconds.values()) - whole
    return {name: value if name == "step" else value * whole / total for name, value in milliseconds.items()}


def table(rows: Rows) -> str:
    """The rows as people read them."""
    head = ("", "trainable", "%", "ms/step", "of full", "fwd", "bwd", "opt", "tokens/s", "memory", "file", "lr", "loss")
    lines = [(*head, "=time", "forgets", "seeds")]
    for r in rows:
        step, *phases = (f"{r['milliseconds'][key]:.1f}" for key in ("step", "forward", "backward", "optimizer"))
        sizes = [report.size(r["peak_memory"]), report.size(r["file_bytes"])]
        forgets = f"{r['base_text_loss_after'] - r['base_text_loss_before']:+.3f}"
        losses = [f"{r['loss_at_equal_steps']:.3f}", f"{r['loss_at_equal_seconds']:.3f}", forgets]
        trains = [r["method"], f"{r['trainable']:,}", f"{r['trainable_percent']:.1f}"]
        times = [step, f"{r['step_over_full']:.2f}", *phases, f"{r['tokens_per_second']:,.0f}"]
        seeds = f"{min(r['losses']):.3f} to {max(r['losses']):.3f}" if len(r["losses"]) > 1 else "1"
        lines.append((*trains, *times, *sizes, f"{r['learning_rate']:g}", *losses, seeds))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def verdict(rows: Rows) -> str:
    """One line in plain words on the LoRA that ends with the lowest loss, also where it does not pay."""
    full, best = rows[0], min(rows[1:], key=lambda r: r["loss_at_equal_steps"])
    memory = f" and {best['peak_memory'] / full['peak_memory']:.2f} of its memory" if full["peak_memory"] else ""
    gained = (full["loss_before"] - best["loss_at_equal_steps"]) / (full["loss_before"] - full["loss_at_equal_steps"])
    pays = "LoRA pays here" if best["step_over_full"] < 1 else "LoRA does not pay in time here"
    return (
        f"{pays}: {best['method']} trains {best['trainable_percent']:.1f} % of the parameters, takes "
        f"{best['step_over_full']:.2f} of full fine-tuning's time a step{memory}, and reaches {100 * gained:.0f} % of "
        "its gain in loss."
    )
