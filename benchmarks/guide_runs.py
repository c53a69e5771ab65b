"""The runs that docs/zero-to-hero/ shows: one setting of LoRA at a time, on a small base, and what each came to.

python -m benchmarks.guide_runs --record     trains what is not there yet, keeps the figures in results/guide.json, and
                                             draws docs/pictures/guide-*.png (10 minutes of one core; `make guide`)

The base has 115,008 parameters: 2 blocks, 64 wide. Each adapter takes 300 steps of 1,024 tokens on the First Folio. All
else is the default, where a row does not say otherwise. Losses are over the whole held-out text.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.runs import ROOT, RUNS, train
from data.corpora import distinct_words, load_corpus, words
from jobs.generating.load import load
from runtime.device import machine_name
from runtime.pictures import new_figure, save_picture
from runtime.processes.command import run_command
from runtime.storage import folders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE = {"n_layer": 2, "n_embd": 64, "block_size": 64, "max_iters": 1000}
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
    return "-".join(["guide", *parts]).replace("_", "-").replace(",", "+").replace("+", "-")


def adapt(settings: dict) -> dict[str, float]:
    """Adapt the base with these settings; returns what the run came to."""
    name = name_of(settings)
    result = train(name, **{"base": "guide-base", "dataset": "folio"} | ADAPTER | settings)
    lines = (RUNS / name / "metrics.jsonl").read_text("utf-8").splitlines()
    highest = max(json.loads(line).get("loss", 0.0) for line in lines)
    return {"loss": result["val_loss"], "base": result["base_val_loss"], "highest": highest}


def sampled(run: str, data_dir: Path) -> dict[str, dict[str, float]]:
    """For each temperature: the share of a sample's words that the text has, and of its words that are new in it."""
    model, _ = load(run, RUNS)
    known, found = distinct_words(load_corpus("folio", data_dir).text), {}
    for temperature in TEMPERATURES:
        made = words(" ".join(model.generate_text("\n", 1000, seed, temperature=temperature) for seed in range(5)))
        real = sum(word in known for word in made) / len(made)
        found[f"{temperature:g}"] = {"words of the text": real, "distinct": len(set(made)) / len(made)}
    return found


def rows_of(record: dict, sweep: str) -> dict[str, float]:
    """{row: its loss} of a sweep."""
    return {row: found["loss"] for row, found in record["sweeps"][sweep].items()}


def draw_settings(record: dict) -> Figure:
    """A panel for each setting, with one scale for all losses."""
    shared = record["sweeps"]["rank"]["8"]
    best = min(rows_of(record, "full").values())
    figure = new_figure("What each setting changes: loss on the First Folio after 300 steps", (9, 5))
    names = ("rank", "alpha", "dropout", "targets", "bias", "learning rate")
    for axes, name in zip(figure.subplots(2, 3, sharey=True).flat, names, strict=True):
        _draw(axes, record, [name])
        axes.axhline(shared["base"], c="0.6", ls=":", lw=1)
        axes.axhline(best, c="0.6", ls="--", lw=1)
        axes.set_xlabel(name, fontsize=9)
        axes.tick_params(labelsize=7)
    figure.axes[0].set_ylim(best - 0.02, shared["base"] + 0.1)
    figure.axes[0].text(0, shared["base"] + 0.01, "the base, not adapted", fontsize=7, c="0.4")
    figure.axes[0].text(0, best + 0.01, "all weights trained", fontsize=7, c="0.4")
    return figure


def draw_ranks(record: dict) -> Figure:
    """Loss over rank for three ways to scale."""
    figure = new_figure("Loss by rank, for three scales of the update", (5, 3.2))
    axes = figure.subplots()
    _draw(axes, record, ["rank", "rank, alpha = 2 rank", "rank, rslora"])
    axes.set_xlabel("rank", fontsize=9)
    axes.legend(["alpha / rank, alpha = 16", "alpha / rank, alpha = 2 rank", "rsLoRA, alpha = 16"], fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _draw(axes: Axes, record: dict, sweeps: list[str]) -> None:
    for sweep in sweeps:
        losses = rows_of(record, sweep)
        if sweep == "learning rate":
            losses = dict(sorted(losses.items(), key=lambda row: float(row[0])))
        axes.plot(list(losses), list(losses.values()), "-o", ms=4)


def draw_samples(record: dict) -> Figure:
    """What the temperature does to a sample's words."""
    figure = new_figure("1,000 characters, five times, at each temperature", (5, 3.2))
    axes = figure.subplots()
    for name in ("words of the text", "distinct"):
        axes.plot(list(record["samples"]), [100 * row[name] for row in record["samples"].values()], "-o", ms=4)
    axes.set_xlabel("temperature", fontsize=9)
    axes.set_ylabel("% of the sample's words", fontsize=9)
    axes.legend(["are words of the First Folio", "occur for the first time"], fontsize=8)
    axes.grid(alpha=0.3)
    return figure


PICTURES = {"settings": draw_settings, "ranks": draw_ranks, "temperature": draw_samples}


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--record", action="store_true", help="keep the figures and draw the pictures")
    flags.add_argument("--data-dir", type=Path, default=Path("data/cache"), help="folder of downloaded texts")
    options = flags.parse_args()
    train("guide-base", **BASE)
    train("guide-base-bias", **BASE, bias=True)
    record: dict = {"machine": machine_name(), "date": time.strftime("%Y-%m-%d"), "sweeps": {}}
    for sweep, rows in SWEEPS.items():
        record["sweeps"][sweep] = {row: adapt(settings) for row, settings in rows.items()}
        print(
            f"{sweep:<22}", ", ".join(f"{row}: {loss:.4f}" for row, loss in rows_of(record, sweep).items()), flush=True
        )
    record["samples"] = sampled(name_of({}), options.data_dir)
    print(record["samples"])
    if options.record:
        folders.write_file(ROOT / "benchmarks/results/guide.json", (json.dumps(record, indent=1) + "\n").encode())
        for name, draw in PICTURES.items():
            save_picture(ROOT / f"docs/pictures/guide-{name}.png", draw, record)


if __name__ == "__main__":
    run_command(main)
