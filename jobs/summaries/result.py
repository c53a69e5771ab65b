"""Prints a run's summary."""

from __future__ import annotations

import statistics

from jobs.runs.job import Job
from lora.attach import adaptable_layers
from lora.layers.linear import LoRALinear
from runtime import report
from runtime.settings.config import Settings
from runtime.start import command_line
from runtime.storage.runs import Run


def print_result(job: Job, run: Run, result: dict) -> None:
    """Time, speed, memory, losses, files."""
    print(f"✅ {run.name} has finished: {result['step']:,} steps in {result['seconds']:.0f} s of training")
    print(f"   Speed: {result['tokens_per_second']:,.0f} tokens/s on {job.machine}")
    whose = " of the process, Python and torch included" if job.machine.device.type == "cpu" else ""
    print(f"   Peak memory: {report.size(result['peak_memory'])}{whose}")
    print(f"   Best validation loss: {result['best']:.4f} at step {result['best_step']:,}")
    base = f" (the base without the adapter: {result['base_val_loss']:.4f})" if "base_val_loss" in result else ""
    part = "text" if "bits_per_character" in result else "records' answers"
    print(f"   Loss over the whole held-out {part}: {result['val_loss']:.4f}{base}")
    if "bits_per_character" in result:
        print(f"   Bits per character of it: {result['bits_per_character']:.4f}")
    print_ranks(job)
    files = sum(path.stat().st_size for path in run.artifact.iterdir())
    print(f"   Files: {run.artifact} ({report.size(files)}), {run.folder / 'metrics.jsonl'}")


def print_ranks(job: Job) -> None:
    """The ranks of the modules, where they are not all the same: a line for each block."""
    linears = {path: layer for path, layer in adaptable_layers(job.model).items() if isinstance(layer, LoRALinear)}
    ranks = {path: variant.current_rank() for path, linear in linears.items() for variant in linear.variants()}
    if len(set(ranks.values())) < 2:
        return
    print(f"   Ranks: {sum(ranks.values())} in {len(ranks)} modules, {statistics.mean(ranks.values()):.2f} on average")
    blocks: dict[str, list[str]] = {}
    for path, rank in ranks.items():
        parent, _, name = path.rpartition(".")
        blocks.setdefault(".".join(parent.split(".")[:2]), []).append(f"{name} {rank}")
    for block, told in blocks.items():
        print(f"      {f'{block}: ' if block else ''}{', '.join(told)}")


def print_next(run: Run) -> None:
    """The command to try after this run."""
    if run.kind == "base":
        s = run.metadata["settings"]  # a base on another text is not the one that a LoRA run takes by itself
        named = [] if s["dataset"] == Settings().dataset else ["--base", run.name]
        line = command_line("training.py", "--use-lora", *named, *(["--test-mode"] if s["test_mode"] else []))
    else:
        line = command_line("generate.py", "--run", run.name)
    print(f"➡️  Next: {line}", flush=True)
