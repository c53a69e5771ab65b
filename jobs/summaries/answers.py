"""The part of a run's summary that only records have: answers to what was held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    def told(self, samples: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Some of the answers by title, beside those that were wanted, and how many repeat an answer of the training
        records word for word: a model that has learned these by heart gives them to other prompts too."""
        asked, known = self.asked, {record.answer.strip() for record in self.job.data.records.train}
        shown = [
            {"asked": _last_asked(r), "wanted": r.answer, "said": {title: found[i] for title, found in samples.items()}}
            for i, r in enumerate(asked[:SHOWN])
        ]

        def is_copy(text: str, record: Record) -> bool:
            return text.strip() in known and text.strip() != record.answer.strip()

        copied = {title: sum(map(is_copy, found, asked)) for title, found in samples.items()}
        return {"answers": shown, "of": len(asked), "copied": copied}

    def print(self, told: Mapping[str, Any]) -> None:
        """Each prompt with its answers, and how many are copies."""
        for answer in told["answers"]:
            print("📝 " + answer["asked"].replace("\n", "\n   "))
            titled = {f"Answer {title}".strip(): text for title, text in answer["said"].items()}
            for title, text in ({"Wanted": answer["wanted"]} | titled).items():
                print(f"   {title}: {report.indented(text.strip()).strip()}")
        for title, copied in told["copied"].items():
            whose = f"{told['of']} answers {title}".rstrip()
            print(f"   {copied} of {whose} are, word for word, what was learned for another prompt")


def _last_asked(record: Record) -> str:
    """What is asked last: of a chat its last message before the answer."""
    if not record.messages:
        return record.prompt.strip()
    message = record.messages[-2]
    return "\n".join(filter(None, (message["content"].strip(), message.get("input", "").strip())))
