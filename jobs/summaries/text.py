"""The part of a run's summary that only text has: samples, and the words in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpora import distinct_words, load_corpus, words
from jobs.runs.job import Job
from models.generation.sampling import Sampling, generate
from runtime import report
from runtime.console import say
from runtime.errors import UserError

SAMPLE_CHARACTERS, TEST_SAMPLE_CHARACTERS = 1_000, 300

FEW = 20  # distinct words below which a sample will hardly have one


@dataclass(frozen=True)
class TextSummary:
    """What a run on a text tells: a `jobs.summaries.summary.Summary`."""

    job: Job

    def figures(self, loss: float) -> dict[str, float]:
        """The loss in nats per token of the held-out text in bits per character of it, whatever its tokens are."""
        data = self.job.data
        return {"bits_per_character": loss * len(data.held_out) / len(data.corpus.validation) / math.log(2)}

    def sample(self) -> str:
        """About 1,000 characters after a newline (300 in TEST_MODE), the same for the same seed and weights."""
        job = self.job
        start = job.tokenizer.encode("\n")
        characters = TEST_SAMPLE_CHARACTERS if job.settings.test_mode else SAMPLE_CHARACTERS
        count = characters * len(job.data.held_out) // len(job.data.corpus.validation)
        how = Sampling(temperature=0.8, stop_ids=job.tokenizer.stop_ids)
        with job.machine.autocast():
            rows = generate(job.model, [start], count, how, job.settings.seed)
        return job.tokenizer.decode(rows[0][len(start) :])

    def told(self, samples: Mapping[str, str]) -> dict[str, Any]:
        """Samples by title, and which of their words the text has; from a base, those that only the text has."""
        foreign = base_words(self.job) if self.job.base else set()
        counted = distinct_words(self.job.data.corpus.text) - foreign
        texts = []
        for title, text in samples.items():
            found = [word for word in words(text) if word in counted]
            marked = list(dict.fromkeys(found)) if foreign else []
            texts.append(
                {"title": title, "text": text, "words": len(words(text)), "found": len(found), "marked": marked}
            )
        name = self.job.data.name
        what = f"words that only {name} has" if foreign else f"words of {name}"
        return {"counted": what, "distinct": len(counted), "texts": texts}

    def print(self, told: Mapping[str, Any]) -> None:
        """Each sample, and how many of its words are counted."""
        for sample in told["texts"]:
            some = f": {', '.join(sample['marked'][:8])}" if sample["marked"] else ""
            title = f"Sample {sample['title']}".strip()
            print(f"📝 {title}:\n{report.indented(sample['text'])}")
            print(f"   {counted_words(told, sample)}{some}")


def counted_words(told: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """How many words of a sample are among those that are counted, of which a text may have too few for that. Runs of
    earlier versions do not say how many there were."""
    if told.get("distinct", FEW) < FEW:
        return f"There are too few {told['counted']} to count them here"
    found, count = sample["found"], max(1, sample["words"])
    return f"{found} of {count} words ({100 * found / count:.0f} %) are {told['counted']}"


def base_words(job: Job) -> set[str]:
    """The words of the text that the base was trained on; none where that text is gone, or not known."""
    if not (dataset := job.base.run.metadata["settings"]["dataset"]):
        return set()
    try:
        return distinct_words(load_corpus(dataset, Path(job.settings.data_dir)).text)
    except UserError as error:
        say(f"Counting words without the base's own text: {error}")
        return set()
