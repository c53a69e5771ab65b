"""What a finished run came to, told to the person who ran it."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from data.corpora import distinct_words, load_corpus, words
from jobs.job import Job
from lora.attach import hosts
from lora.layers import LoRALinear
from models.sampling import Sampling, generate
from runtime import report
from runtime.checkpoint import Run
from runtime.console import say
from runtime.errors import UserError
from runtime.start import command_line

SAMPLE_CHARACTERS, TEST_SAMPLE_CHARACTERS = 1_000, 300


def sample(job: Job) -> str:
    """About 1,000 characters after a newline (300 in TEST_MODE), the same for the same seed and weights."""
    start = job.tokenizer.encode("\n").tolist()
    characters = TEST_SAMPLE_CHARACTERS if job.settings.test_mode else SAMPLE_CHARACTERS
    count = characters * len(job.validation) // len(job.corpus.validation)
    with job.machine.autocast():
        rows = generate(job.model, [start], count, Sampling(temperature=0.8), job.settings.seed)
    return job.tokenizer.decode(rows[0][len(start) :])


def bits_per_character(job: Job, loss: float) -> float:
    """A loss in nats per token of the held-out text in bits per character of it, whatever its tokens are."""
    return loss * len(job.validation) / len(job.corpus.validation) / math.log(2)


def tell_result(job: Job, run: Run, result: dict) -> None:
    """Time, speed, memory, losses, files."""
    print(f"✅ {run.name} has finished: {result['step']:,} steps in {result['seconds']:.0f} s of training")
    print(f"   Speed: {result['tokens_per_second']:,.0f} tokens/s on {job.machine}")
    print(f"   Peak memory: {report.size(result['peak_memory'])}")
    print(f"   Best validation loss: {result['best']:.4f} at step {result['best_step']:,}")
    base = f" (the base without the adapter: {result['base_val_loss']:.4f})" if "base_val_loss" in result else ""
    print(f"   Loss over the whole held-out text: {result['val_loss']:.4f}{base}")
    print(f"   Bits per character of it: {result['bits_per_character']:.4f}")
    tell_ranks(job)
    files = sum(path.stat().st_size for path in run.product.iterdir())
    print(f"   Files: {run.product} ({report.size(files)}), {run.folder / 'metrics.jsonl'}")


def tell_ranks(job: Job) -> None:
    """The ranks of the modules, where they are not all the same: a line for each block."""
    linears = {path: host for path, host in hosts(job.model).items() if isinstance(host, LoRALinear)}
    ranks = {path: variant.rank_left() for path, linear in linears.items() for variant in linear.variants()}
    if len(set(ranks.values())) < 2:
        return
    print(f"   Ranks: {sum(ranks.values())} in {len(ranks)} modules, {statistics.mean(ranks.values()):.2f} on average")
    blocks: dict[str, list[str]] = {}
    for path, rank in ranks.items():
        parent, _, name = path.rpartition(".")
        blocks.setdefault(".".join(parent.split(".")[:2]), []).append(f"{name} {rank}")
    for block, told in blocks.items():
        print(f"      {f'{block}: ' if block else ''}{', '.join(told)}")


def tell_samples(job: Job, samples: dict[str, str]) -> None:
    """Samples of text by title, and how many of their words the text has; from a base, those only the text has."""
    foreign = base_words(job) if job.base else set()
    counted = distinct_words(job.corpus.text) - foreign
    which = f"that only {job.corpus.name} has" if foreign else f"of {job.corpus.name}"
    for title, text in samples.items():
        found, count = [word for word in words(text) if word in counted], max(1, len(words(text)))
        some = f": {', '.join(list(dict.fromkeys(found))[:8])}" if foreign and found else ""
        print(f"📝 {title}:\n{report.indented(text)}")
        print(f"   {len(found)} of {count} words ({100 * len(found) / count:.0f} %) are words {which}{some}")


def base_words(job: Job) -> set[str]:
    """The words of the text that the base was trained on; none where that text is gone, or not known."""
    if not (dataset := job.base.about["settings"]["dataset"]):
        return set()
    try:
        return distinct_words(load_corpus(dataset, Path(job.settings.data_dir)).text)
    except UserError as error:
        say(f"Counting words without the base's own text: {error}")
        return set()


def tell_next(job: Job, run: Run) -> None:
    """The command to try after this run."""
    if job.kind == "base":
        line = command_line("training.py", "--use-lora", *(["--test-mode"] if job.settings.test_mode else []))
    else:
        line = command_line("generate.py", "--run", run.name)
    print(f"➡️  Next: {line}", flush=True)
