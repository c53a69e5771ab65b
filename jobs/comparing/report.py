"""What a comparison came to: its rows over several seeds, as a table, and in one line."""

from __future__ import annotations

import statistics
from typing import Any

from jobs.comparing.timing import ratio
from runtime import report

Rows = list[dict[str, Any]]


def over_seeds(runs: list[Rows]) -> Rows:
    """One row a method: medians over the seeds, the range of its losses, the times of its steps with all seeds.

    milliseconds: medians of a step and of its phases, which are scaled to add up to it. step_over_full: the ratio of
    the step to that of full fine-tuning, with its interval. Curves and file sizes are those of the first seed.
    """
    merged = []
    for same in zip(*runs, strict=True):
        seconds = {phase: [s for row in same for s in row["seconds"][phase]] for phase in same[0]["seconds"]}
        steps = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
        found = {k: v for k, v in same[0].items() if k != "seconds"}
        found |= {k: statistics.median(row[k] for row in same) for k, v in found.items() if isinstance(v, float)}
        found |= {"losses": [row["loss_at_equal_steps"] for row in same], "steps": steps}
        found["milliseconds"] = _milliseconds(steps, seconds)
        found["tokens_per_second"] = 1e3 * found["tokens_per_step"] / found["milliseconds"]["step"]
        merged.append(found)
    full = merged[0]["steps"]
    return [{**found, "step_over_full": ratio(found.pop("steps"), full)} for found in merged]


def _milliseconds(steps: list[float], seconds: dict[str, list[float]]) -> dict[str, float]:
    medians = {phase: statistics.median(values) for phase, values in seconds.items()}
    whole = 1e3 * statistics.median(steps)
    return {"step": whole} | {phase: whole * value / sum(medians.values()) for phase, value in medians.items()}


def table(rows: Rows) -> str:
    """The rows as people read them."""
    head = ("", "trainable", "%", "ms/step", "of full", "fwd", "bwd", "opt", "tokens/s", "memory", "file", "lr", "loss")
    lines = [(*head, "=time", "forgets", "seeds")]
    for r in rows:
        step, *phases = (f"{r['milliseconds'][key]:.1f}" for key in ("step", "forward", "backward", "optimizer"))
        sizes = [report.size(r["peak_memory"]), report.size(r["file_bytes"])]
        before, after = r["base_text_loss_before"], r["base_text_loss_after"]
        forgets = "?" if before is None else f"{after - before:+.3f}"
        losses = [f"{r['loss_at_equal_steps']:.3f}", f"{r['loss_at_equal_seconds']:.3f}", forgets]
        trains = [r["method"], f"{r['trainable']:,}", f"{r['trainable_percent']:.1f}"]
        times = [step, str(r["step_over_full"]), *phases, f"{r['tokens_per_second']:,.0f}"]
        seeds = f"{min(r['losses']):.3f} to {max(r['losses']):.3f}" if len(r["losses"]) > 1 else "1"
        lines.append((*trains, *times, *sizes, f"{r['learning_rate']:g}", *losses, seeds))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def verdict(rows: Rows) -> str:
    """One line in plain words on the LoRA that ends with the lowest loss, also where it does not pay.

    Of several whose losses, over the seeds, overlap with the lowest one's, it is the one with the fastest step.
    """
    full, lowest = rows[0], min(rows[1:], key=lambda r: r["loss_at_equal_steps"])
    alike = [row for row in rows[1:] if min(row["losses"]) <= max(lowest["losses"])]
    best = min(alike, key=lambda r: r["step_over_full"].value)
    memory = f" and {best['peak_memory'] / full['peak_memory']:.2f} of its memory" if full["peak_memory"] else ""
    gained = (full["loss_before"] - best["loss_at_equal_steps"]) / (full["loss_before"] - full["loss_at_equal_steps"])
    pays = {
        True: "LoRA pays here",
        False: "LoRA does not pay in time here",
        None: "Too noisy to say whether LoRA pays in time here",
    }[best["step_over_full"].below_one]
    return (
        f"{pays}: {best['method']} trains {best['trainable_percent']:.1f} % of the parameters, takes "
        f"{best['step_over_full']} of full fine-tuning's time a step{memory}, and reaches {100 * gained:.0f} % of "
        "its gain in loss."
    )
