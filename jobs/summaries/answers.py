"""The part of a run's summary that only records have: answers to what was held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.instructions.records import Record
from jobs.generating.answering import answers
from jobs.runs.job import Job
from models.generation.sampling import Sampling
from runtime import report

PROMPTS, SHOWN = 16, 3  # that are answered, and of these, that are shown
LONGEST = 256  # tokens of an answer


@dataclass(frozen=True)
class AnswerSummary:
    """What a run on records tells: a `jobs.summaries.summary.Summary`."""

    job: Job

    @property
    def asked(self) -> list[Record]:
        """The held-out records that are answered, spread evenly."""
        found, count = self.job.data.records.validation, PROMPTS if not self.job.settings.test_mode else SHOWN
        return [found[i * len(found) // min(count, len(found))] for i in range(min(count, len(found)))]

    def figures(self, loss: float) -> dict[str, float]:
        """There is none beside the loss."""
        return {}

    def sample(self) -> list[str]:
        """The likeliest answer to each."""
        job = self.job
        how = Sampling(greedy=True)
        found = answers(job.model, job.tokenizer, job.data.template, self.asked, how, LONGEST, job.machine, 0)
        return [answer.text for answer in found]

    def print(self, samples: Mapping[str, Sequence[str]]) -> None:
        """Some of the answers by title, beside those that were wanted, and how many repeat an answer of the training
        records word for word: a model that has learned these by heart gives them to other prompts too."""
        asked, known = self.asked, {record.answer.strip() for record in self.job.data.records.train}
        for i, record in enumerate(asked[:SHOWN]):
            print(f"📝 {_last_asked(record)}")
            told = {"Wanted": record.answer} | {f"Answer {title}".strip(): found[i] for title, found in samples.items()}
            for title, text in told.items():
                print(f"   {title}: {report.indented(text.strip()).strip()}")
        for title, found in samples.items():
            pairs = zip(found, asked, strict=True)
            copied = sum(text.strip() in known and text.strip() != record.answer.strip() for text, record in pairs)
            whose = f"{len(found)} answers {title}".rstrip()
            print(f"   {copied} of {whose} are, word for word, what was learned for another prompt")


def _last_asked(record: Record) -> str:
    if not record.messages:
        return record.prompt.strip()
    message = record.messages[-2]
    return "\n   ".join(filter(None, (message["content"].strip(), message.get("input", "").strip())))
