"""What training and evaluation ask of data, whatever it is made of."""

from __future__ import annotations

from typing import Protocol

from runtime.training.batch import Batch


class Dataset(Protocol):
    """Batches for training, as a function of the step, and batches for evaluation.

    name: short and made of [a-z0-9-], fit for the name of a run. sha256: hex digest of all that decides the batches but
    for the settings; it is part of a run's identity. steps_in_epoch: how many steps see all of it once. tokens_in_step:
    how many tokens a step learns from, on average.
    """

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def steps_in_epoch(self) -> float: ...

    @property
    def tokens_in_step(self) -> float: ...

    def batch(self, step: int) -> Batch:
        """All rows of an optimisation step, the same for the same step; whoever trains cuts them into parts."""

    def validation(self, limit: int | None) -> list[Batch]:
        """The held-out part in batches, at most `limit` of them; all of it where that is None."""
