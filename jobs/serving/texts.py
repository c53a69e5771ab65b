"""A request's texts on their way from the engine's thread to the client, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import NamedTuple

from data.tokenizers import Tokenizer
from jobs.generating.stopping import StopAt
from jobs.serving.calls import Call
from jobs.serving.engine import Engine, FailedError
from models.generation.continuous import Made


class Piece(NamedTuple):
    """What is new of a text: which one it is, the text, and at its end why it ended, `stop` or `length`, and how many
    tokens it has."""

    index: int
    text: str
    ended: str | None = None
    tokens: int = 0


class OnItsWay:
    """A text that is being made, as the engine's thread tells of it."""

    def __init__(self, index: int, call: Call, tokenizer: Tokenizer, tell: Callable[[Piece | None], None]) -> None:
        self.index, self.call, self.tell = index, call, tell
        self.decoder, self.until = tokenizer.stream(), StopAt(call.stops)

    def watch(self) -> Callable[[int], bool]:
        """What is told of each token, and says whether the text ends there."""

        def ends(token: int) -> bool:
            if text := self.until.feed(self.decoder.feed(token)):
                self.tell(Piece(self.index, text))
            return self.until.ended

        return ends

    def done(self, made: Made | None) -> None:
        """The text is finished; None: it will never be."""
        if made is None:
            self.tell(None)
            return
        stopped = self.until.ended or len(made.tokens) < self.call.max_new_tokens
        rest = "" if self.until.ended else self.until.feed(self.decoder.flush()) + self.until.flush()
        self.tell(Piece(self.index, rest, "stop" if stopped else "length", len(made.tokens)))


async def pieces_of(call: Call, engine: Engine, tokenizer: Tokenizer) -> AsyncIterator[Piece]:
    """The pieces of all texts, as they come. Whoever leaves early frees their places.

    Raises FullError where there is no room for them, FailedError where the engine fails.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

    def tell(piece: Piece | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(queue.put_nowait, piece)

    texts = [OnItsWay(i, call, tokenizer, tell) for i in range(len(call.prompts) * call.choices)]
    asked = call.asked(lambda i: texts[i].watch)
    tickets = engine.submit([(each, text.done) for each, text in zip(asked, texts, strict=True)])
    left = len(tickets)
    try:
        while left:
            if (piece := await queue.get()) is None:
                raise FailedError
            left -= piece.ended is not None
            yield piece
    finally:
        engine.cancel(tickets)
