"""Which summary a run has: by what it learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from data.text import TextData
from jobs.runs.job import Job
from jobs.summaries.answers import AnswerSummary
from jobs.summaries.text import TextSummary


class Summary(Protocol):
    """What a finished run tells beside its losses. A sample is what the model says as it stands."""

    def figures(self, loss: float) -> dict[str, float]:
        """More of result.json, given the loss over all that is held out."""

    def sample(self) -> Any:
        """Texts of the model."""

    def told(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """What result.json keeps of samples by title: `with the adapter`, `without it`, or empty."""

    def print(self, told: Mapping[str, Any]) -> None:
        """Print what is kept of the samples."""


def summary_of(job: Job) -> Summary:
    """The summary of a run on a text, or on records."""
    return TextSummary(job) if isinstance(job.data, TextData) else AnswerSummary(job)
