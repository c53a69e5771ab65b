"""Where a LoRA step starts to be the faster one: width x batch x rank, each cell timed against a full step in turns.

Weights and tokens are random, as a step's time does not depend on them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.comparing.timing import Ratio, ratio, repeatable, take_turns
from jobs.runs.job import lora_config
from lora.attach import attach
from models.config import ModelConfig
from models.transformer import Transformer
from runtime.device import Machine
from runtime.progress import Progress
from runtime.settings.config import Settings
from runtime.storage import folders
from runtime.storage.encoding import read_json
from runtime.training.steps import Stepper

VOCABULARY = 96  # of the character tokenizer
ROUNDS, TEST_ROUNDS = 11, 5  # with 3, steps of one speed are said to differ in a quarter of all cells, with 5 in 6 %


def make_stepper(settings: Settings, machine: Machine, width: int, batch: int, rank: int | None) -> Stepper:
    """Steps of a model of this width on `batch` rows; LoRA of this rank, or all weights where it is None."""
    s, T = settings, settings.block_size
    torch.manual_seed(s.seed)
    config = ModelConfig(VOCABULARY, width, s.n_layer, s.n_head, max_positions=T, bias=s.bias)
    model = Transformer(config, s.dropout, machine.device)
    if rank:
        attach(model, dataclasses.replace(lora_config(s), rank=rank))
    return repeatable(model, torch.randint(VOCABULARY, (batch, T + 1)), machine, s.lora_plus_ratio)


def measure(settings: Settings, machine: Machine, width: int, batch: int, ranks: Iterable[int]) -> list[dict[str, Any]]:
    """The cells of one width and batch: milliseconds of a step, and LoRA's part of the full step's time."""
    steppers = {"full": make_stepper(settings, machine, width, batch, None)}
    steppers |= {str(rank): make_stepper(settings, machine, width, batch, rank) for rank in ranks}
    rounds = range(1 + (TEST_ROUNDS if settings.test_mode else ROUNDS))
    seconds = take_turns({label: partial(stepper.step, 0) for label, stepper in steppers.items()}, rounds, machine)
    full = seconds.pop("full")
    return [
        {
            "width": width,
            "batch": batch,
            "rank": int(rank),
            "full_ms": 1e3 * statistics.median(full),
            "lora_ms": 1e3 * statistics.median(times),
            "ratio": ratio(times, full),
        }
        for rank, times in seconds.items()
    ]


def sweep(
    settings: Settings, machine: Machine, widths: list[int], batches: list[int], ranks: list[int], file: Path
) -> list[dict[str, Any]]:
    """All cells; those in the file are not measured again, and each new one is written there at once."""
    cells = read_json(file.read_bytes(), str(file))["cells"] if file.exists() else []
    # Earlier versions kept no interval: those cells are measured again.
    cells = [cell | {"ratio": Ratio(*cell["ratio"])} for cell in cells if isinstance(cell["ratio"], list)]
    rows = [(width, batch) for width in widths for batch in batches]
    progress = Progress("sweep", len(rows), 0)
    for i, (width, batch) in enumerate(rows):
        there = {cell["rank"] for cell in cells if (cell["width"], cell["batch"]) == (width, batch)}
        if missing := [rank for rank in ranks if rank not in there]:
            cells += measure(settings, machine, width, batch, missing)
            folders.write_file(file, (json.dumps({"cells": cells}, indent=1) + "\n").encode())
        progress.update(i + 1, width=width, batch=batch)
    progress.close()
    wanted = {(width, batch, rank) for width, batch in rows for rank in ranks}
    return [cell for cell in cells if (cell["width"], cell["batch"], cell["rank"]) in wanted]


def sweep_verdict(cells: list[dict[str, Any]]) -> str:
    """From which width on a LoRA step is the faster one, for each batch, at the rank nearest to 8."""
    rank = min({cell["rank"] for cell in cells}, key=lambda rank: abs(rank - 8))
    found = []
    for batch in sorted({cell["batch"] for cell in cells}):
        row = {c["width"]: c["ratio"].below_one for c in cells if (c["batch"], c["rank"]) == (batch, rank)}
        not_faster = [width for width, faster in row.items() if not faster]
        pays = [width for width in sorted(row) if width > max(not_faster, default=0)]
        noisy = [f"{width}" for width in sorted(row) if row[width] is None]
        unsure = f" (too noisy to say at {', '.join(noisy)})" if noisy else ""
        found.append(f"{f'from width {pays[0]} on' if pays else 'at no width'} at batch {batch}{unsure}")
    return f"On this machine a LoRA step of rank {rank} is faster than a full step {', '.join(found)}."


def sweep_table(cells: list[dict[str, Any]]) -> str:
    """LoRA's part of the full step's time: a line for each width and batch, a column for each rank."""
    ranks = sorted({cell["rank"] for cell in cells})
    by = {(cell["width"], cell["batch"], cell["rank"]): cell for cell in cells}
    lines = [f"{'width':>6} {'batch':>6} {'full ms':>9} " + " ".join(f"{f'r={rank}':>16}" for rank in ranks)]
    for width, batch in sorted({key[:2] for key in by}):
        row = [by[width, batch, rank] for rank in ranks]
        lines.append(
            f"{width:>6} {batch:>6} {row[0]['full_ms']:>9.1f} " + " ".join(f"{str(c['ratio']):>16}" for c in row)
        )
    return "\n".join(lines)
