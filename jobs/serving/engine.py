"""A batch of texts for clients that come and go, made by a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from lora.mixing import mixing
from models.generation.continuous import Asked, Batch, Made, Row
from models.transformer import Transformer
from runtime.device import Machine


class FullError(Exception):
    """As many texts are waiting as may."""


class FailedError(Exception):
    """The engine has failed, and no text will come."""


@dataclass(eq=False)
class Ticket:
    """A text that waits or is made. done(text) is called with it, or with None where the engine has failed."""

    asked: Asked
    done: Callable[[Made | None], None]
    cancelled: bool = False


class Engine:
    """Makes texts in the places of one batch; the others wait, in the order in which they came. A prompt of several
    pieces is read a piece at a time, between the passes of the others.

    All that is told of a text, by `Asked.watch` and `Ticket.done`, is told from the engine's thread. Every pass goes
    through all places and rounds alike, so a text does not depend on what else is asked for.
    """

    def __init__(
        self, model: Transformer, adapters: Sequence[str], machine: Machine, places: int, waiting: int,
        failed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """adapters: as they are called on the model. waiting: how many texts may wait. failed() is called where the
        engine fails, once all who wait have been told; `failure` says why."""
        self.model, self.adapters, self.machine, self.places = model, adapters, machine, places
        self.most, self.queue, self.changed = waiting, deque[Ticket](), threading.Condition()
        self.made: dict[int, Ticket] = {}  # by the number of the row
        self.numbers, self.closing, self.failed = 0, False, failed
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End when the texts that are under way are finished."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    @property
    def busy(self) -> tuple[int, int]:
        """How many texts are being made, and how many wait."""
        return len(self.made), len(self.queue)

    def submit(self, wanted: Sequence[tuple[Asked, Callable[[Made | None], None]]]) -> list[Ticket]:
        """Ask for texts, all or none. Raises FullError where there is no room for all, FailedError where the engine has
        ended, ValueError for an empty prompt."""
        if not all(asked.prompt for asked, _ in wanted):
            raise ValueError("a prompt needs at least one token")
        with self.changed:
            if self.failure or self.closing:
                raise FailedError
            if len(self.queue) + len(wanted) > self.most + self.places - len(self.made):
                raise FullError
            tickets = [Ticket(*each) for each in wanted]
            self.queue.extend(tickets)
            self.changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Nobody wants these any more: what is left of them is not made."""
        with self.changed:
            for ticket in tickets:
                ticket.cancelled = True
            self.changed.notify()

    def _work(self) -> None:
        try:
            self.model.eval()
            with mixing(self.model, self.adapters) as mix, self.machine.autocast():
                batch = Batch(self.model, self.places, mix, pieces=1)
                while (new := self._next(batch)) is not None:
                    if any(batch.rows) or new:
                        self._advance(batch, new)
        except BaseException as failure:  # whoever waits must learn of it
            self.failure = failure
            with self.changed:
                for ticket in [*self.made.values(), *self.queue]:
                    ticket.done(None)
            self.failed()

    def _advance(self, batch: Batch, new: dict[int, Row]) -> None:
        """One more token for every row that has been read."""
        for row, text in list(batch.choose(batch.advance(new), scored=False)):
            if text:
                self.made.pop(row.number).done(text)

    def _next(self, batch: Batch) -> dict[int, Row] | None:
        """What moves into empty places, by place, as soon as there is something to do; None at the end."""
        with self.changed:
            while True:
                for place, row in enumerate(batch.rows):
                    if row and self.made[row.number].cancelled:
                        batch.release(place)
                        del self.made[row.number]
                for ticket in [ticket for ticket in self.queue if ticket.cancelled]:
                    self.queue.remove(ticket)
                if self.queue or any(batch.rows):
                    break
                if self.closing:
                    return None
                self.changed.wait()
            free = [place for place, row in enumerate(batch.rows) if row is None]
            new = {}
            for place in free[: len(self.queue)]:
                ticket, self.numbers = self.queue.popleft(), self.numbers + 1
                self.made[self.numbers], new[place] = ticket, Row(self.numbers, ticket.asked)
            return new
