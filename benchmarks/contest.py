"""Contestants timed in turn in one process, so that what disturbs the machine hits all alike; ratios of medians."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from jobs.comparing import timing
from runtime.device import Machine, machine_name
from runtime.storage import folders

SIZES = {  # name: vocab_size, n_embd, n_head, n_layer, block_size
    "tiny": (96, 32, 2, 1, 16),  # measures nothing; shows that a benchmark runs
    "0.8M": (96, 128, 4, 4, 128),
    "3.2M": (96, 256, 4, 4, 128),
    "10.7M": (96, 384, 6, 6, 256),
    "85M": (96, 768, 12, 12, 256),
    "124M": (50304, 768, 12, 12, 1024),
}


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=rounds)
    flags.add_argument("--device", default="auto")
    flags.add_argument("--record", action="store_true", help="keep the rows in benchmarks/results")
    return flags


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int, where: Machine) -> dict[str, list[float]]:
    """Seconds of each call, by contestant, a call each a round, with the progress on a terminal."""
    counted = tqdm(range(rounds + 1), desc="rounds", disable=not sys.stderr.isatty(), leave=False)
    return timing.take_turns(contestants, counted, where)


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """How long `one` takes of `other`: the ratio of medians, and the least and most of the rounds' own ratios."""
    rounds = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
    median = statistics.median(seconds[one]) / statistics.median(seconds[other])
    return {"median": median, "min": min(rounds), "max": max(rounds)}


def tell(rows: list[dict]) -> None:
    """A line a row: what was measured, its ratio, and the goal where there is one."""
    for row in rows:
        goal = f"   goal {row['goal']}" if row.get("goal") is not None else ""
        print(f"{row['what']:<72} {row['median']:6.2f}  ({row['min']:.2f} to {row['max']:.2f}){goal}", flush=True)


def close(name: str, rows: list[dict], keep: bool) -> None:
    """Say on which machine the rows were measured, and keep them in `benchmarks/results/<name>.json` where asked, in
    `<name>-gpu.json` where there is a GPU."""
    print(machine_name())
    if keep:
        name += "-gpu" if torch.cuda.is_available() else ""
        path = Path(__file__).with_name("results") / f"{name}.json"
        about = {"machine": machine_name(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
        folders.write_file(path, (json.dumps(about, indent=1) + "\n").encode())
        print(f"Written to {path}")


def by_size(
    name: str, description: str, measure: Callable[..., list[dict]], rounds: int, sizes: list[str], tokens: list[int]
) -> None:
    """A benchmark of steps: measure(size, tokens, rounds, device) -> rows, for each size and number of tokens asked."""
    flags = parser(description, rounds)
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=sizes)
    flags.add_argument("--tokens", nargs="+", type=int, default=tokens)
    options, rows = flags.parse_args(), []
    for size in options.sizes:
        for count in options.tokens:
            rows += (found := measure(size, count, options.rounds, options.device))
            tell(found)
    close(name, rows, options.record)
