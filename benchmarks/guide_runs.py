"""The runs that docs/zero-to-hero/ shows: one setting of LoRA at a time, on a small base, and what each came to.

python -m benchmarks.guide_runs --record     trains what is not there yet, keeps the figures in results/guide.json, and
                                             draws docs/pictures/guide-*.png (10 minutes of one core; `make guide`)

The base has 115,008 parameters: 2 blocks, 64 wide, learned positions. Each adapter takes 300 steps of 1,024 tokens on
the First Folio. All else is the default, where a row does not say otherwise. Losses are over the whole held-out text.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contest import close
from benchmarks.runs import ROOT, RUNS, train
from data.corpora import distinct_words, load_corpus, words
from jobs.generating.load import load
from runtime.pictures import new_figure, save_picture
from runtime.processes.command import run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from models.transformer import Transformer

Record = dict[str, dict[str, dict[str, float]]]

BASE = {"architecture": "gpt", "n_layer": 2, "n_embd": 64, "block_size": 64, "max_iters": 1000}
ADAPTER = {"use_lora": True, "max_iters": 300}
RANKS = (1, 2, 4, 8, 16, 32, 64)
RSLORA = {"lora_variant": "rslora"}
SWEEPS = {  # {sweep: {row: its settings beside ADAPTER}}; a row with none is the run that all sweeps share
    "rank": {str(r): {"lora_rank": r} if r != 8 else {} for r in RANKS},
    "rank, alpha = 2 rank": {str(r): {"lora_rank": r, "lora_alpha": 2 * r} if r != 8 else {} for r in RANKS},
    "rank, rslora": {str(r): {"lora_rank": r, **RSLORA} for r in RANKS},
    "alpha": {str(a): {"lora_alpha": a} if a != 16 else {} for a in (1, 4, 8, 16, 32, 64, 256)},
    "dropout": {"0": {}} | {str(p): {"lora_dropout": p} for p in (0.05, 0.1, 0.3, 0.5)},
    "targets": {
        "q_proj": {"lora_targets": "q_proj"},
        "minimal": {"lora_targets": "minimal"},
        "standard": {"lora_targets": "standard"},
        "MLP": {"lora_targets": "up_proj,down_proj"},
        "all-linear": {"lora_targets": "all-linear"},
        "all": {},
    },
    "bias": {kind: {"lora_bias": kind, "base": "guide-base-bias"} for kind in ("none", "lora_only", "all")},
    "embeddings": {"trained": {}, "frozen": {"lora_train_embeddings": False}},
    "learning rate": {"0.004": {}}
    | {f"{rate:g}": {"learning_rate": rate} for rate in (1e-3, 2e-3, 8e-3, 16e-3, 64e-3)},
    "full": {f"{rate:g}": {"use_lora": False, "learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3)},
    "at 0.064": {
        "clipped at 1": {"learning_rate": 64e-3},
        "not clipped": {"learning_rate": 64e-3, "grad_clip": 0},
        "warm-up of 100": {"learning_rate": 64e-3, "warmup_iters": 100},
        "LoRA+ off": {"learning_rate": 64e-3, "lora_plus_ratio": 1},
        "alpha 2": {"learning_rate": 64e-3, "lora_alpha": 2},
    },
    "steps": {"300": {}} | {str(n): {"max_iters": n} for n in (10, 30, 100, 1000)},
    "seed": {"1337": {}} | {str(seed): {"seed": seed} for seed in (1338, 1339)},
    "variant": {"lora": {}} | {name: {"lora_variant": name} for name in ("dora", "vera", "adalora")},
}
TEMPERATURES = (0.2, 0.5, 0.8, 1.0, 1.5)


def name_of(settings: dict) -> str:
    """The run's name, made of what its settings change."""
    parts = [f"{key.removeprefix('lora_')}-{value}" for key, value in settings.items()]
    return "-".join(["guide", *parts]).replace("_", "-").replace(",", "-")


def adapt(settings: dict) -> dict[str, float]:
    """Adapt the base with these settings; returns the loss over the held-out text, the highest of a step, and of a LoRA
    run the base's."""
    name = name_of(settings)
    result = train(name, **{"base": "guide-base", "dataset": "folio"} | ADAPTER | settings)
    lines = (RUNS / name / "metrics.jsonl").read_text("utf-8").splitlines()
    highest = max(json.loads(line).get("loss", 0.0) for line in lines)
    before = {"base": result["base_val_loss"]} if "base_val_loss" in result else {}
    return {"loss": result["val_loss"], "highest": highest} | before


def sample(model: Transformer, known: set[str], temperature: float) -> dict[str, float]:
    """Five texts of 1,000 characters: the share of their words that are known, and of those that are new in them."""
    made = words(" ".join(model.generate_text("\n", 1000, seed, temperature=temperature) for seed in range(5)))
    return {"known": sum(word in known for word in made) / len(made), "new": len(set(made)) / len(made)}


def row_of(sweep: str, row: str, figures: dict[str, float]) -> dict:
    """A row of the record. What stands first among the figures is what it is of."""
    first, value = next(iter(figures.items()))
    spread = {"median": value, "min": value, "max": value}
    return {"what": f"{sweep} {row}: {first}", "sweep": sweep, "row": row, "figures": figures} | spread


def recorded() -> Record:
    """What `--record` kept: {sweep: {row: its figures}}."""
    found: Record = {}
    for row in json.loads((ROOT / "benchmarks/results/guide.json").read_bytes())["rows"]:
        found.setdefault(row["sweep"], {})[row["row"]] = row["figures"]
    return found


def losses_of(record: Record, sweep: str) -> dict[str, float]:
    """{row: its loss} of a sweep: where the rows are numbers, in their order."""
    rows = record[sweep]
    in_order = sorted(rows, key=float) if all(re.fullmatch(r"[\d.]+", row) for row in rows) else rows
    return {row: rows[row]["loss"] for row in in_order}


def print_sweeps(*sweeps: str) -> None:
    """Print the recorded losses of sweeps with the same rows as a table in Markdown, a line for each."""
    losses = {sweep: losses_of(recorded(), sweep) for sweep in sweeps}
    head = list(losses[sweeps[0]])
    print(f"| {sweeps[0]} | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
    for sweep, found in losses.items():
        name = "loss" if len(losses) == 1 else sweep
        print(f"| {name} | {' | '.join(f'{found[row]:.3f}' for row in head)} |")


def draw_settings(record: Record) -> Figure:
    """A panel for each setting, with one scale for all losses."""
    base, best = record["rank"]["8"]["base"], min(losses_of(record, "full").values())
    figure = new_figure("What each setting changes: loss on the First Folio after 300 steps", (6.8, 3.7))
    names = ("rank", "alpha", "dropout", "targets", "bias", "learning rate")
    for axes, name in zip(figure.subplots(2, 3, sharey=True).flat, names, strict=True):
        _draw(axes, losses_of(record, name), name)
        axes.axhline(base, c="0.6", ls=":", lw=1)
        axes.axhline(best, c="0.6", ls="--", lw=1)
    figure.axes[0].set_ylim(best - 0.04, base + 0.1)
    free = figure.axes[names.index("bias")]
    free.text(0, base + 0.01, "the base, not adapted", fontsize=7, c="0.4")
    free.text(0, best - 0.025, "all weights trained", fontsize=7, c="0.4")
    return figure


def draw_ranks(record: Record) -> Figure:
    """Loss over rank for three ways to scale."""
    figure = new_figure("Loss on the First Folio by rank, for three scales of the update", (5, 2.8))
    axes = figure.subplots()
    for sweep in ("rank", "rank, alpha = 2 rank", "rank, rslora"):
        _draw(axes, losses_of(record, sweep), "rank")
    axes.legend(["alpha / rank, alpha = 16", "alpha / rank, alpha = 2 rank", "rsLoRA, alpha = 16"], fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def draw_samples(record: Record) -> Figure:
    """What the temperature does to a sample's words."""
    figure = new_figure("Words of 5,000 characters, by temperature", (5, 2.8))
    axes = figure.subplots()
    for name in ("known", "new"):
        _draw(axes, {row: 100 * found[name] for row, found in record["temperature"].items()}, "temperature")
    axes.set_ylabel("% of the words", fontsize=9)
    axes.legend(["are words of the First Folio", "occur for the first time"], fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _draw(axes: Axes, values: dict[str, float], name: str) -> None:
    axes.plot(list(values), list(values.values()), "-o", ms=4)
    axes.set_xlabel(name, fontsize=8)
    axes.tick_params(labelsize=6)


PICTURES = {"settings": draw_settings, "ranks": draw_ranks, "temperature": draw_samples}


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--record", action="store_true", help="keep the figures and draw the pictures")
    flags.add_argument("--data-dir", type=Path, default=Path("data/cache"), help="folder of downloaded texts")
    options, rows = flags.parse_args(), []
    train("guide-base", **BASE)
    train("guide-base-bias", **BASE, bias=True)
    for sweep, settings in SWEEPS.items():
        rows += [row_of(sweep, row, adapt(changed)) for row, changed in settings.items()]
        print(
            f"{sweep:<22}", ", ".join(f"{r['row']}: {r['median']:.4f}" for r in rows if r["sweep"] == sweep), flush=True
        )
    model, known = load(name_of({}), RUNS)[0], distinct_words(load_corpus("folio", options.data_dir).text)
    rows += [row_of("temperature", f"{t:g}", sample(model, known, t)) for t in TEMPERATURES]
    close("guide", rows, options.record)
    if options.record:
        for name, draw in PICTURES.items():
            save_picture(ROOT / f"docs/pictures/guide-{name}.png", draw, recorded())


if __name__ == "__main__":
    run_command(main)
