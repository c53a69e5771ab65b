"""The answers of OpenAI's protocol: whole ones, the events of a stream, and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobs.serving.bodies import RefusedError
from jobs.serving.calls import Call
from jobs.serving.texts import Piece

END = b"data: [DONE]\n\n"
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: RefusedError) -> dict[str, Any]:
    """An error as the protocol has it."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def event(body: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


class Completion:
    """The answer to a request for completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, call: Call) -> None:
        self.call = call
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": call.offer.name}

    def choice(self, text: str) -> dict[str, Any]:
        """A text in a whole answer."""
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        """A piece of a text in an event."""
        return {"text": text}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with, for each text."""
        return []

    def answer(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All pieces as one answer."""
        count, choices = len(self.call.prompts) * self.call.choices, []
        for i in range(count):
            mine = [piece for piece in pieces if piece.index == i]
            choice = {"index": i, "finish_reason": mine[-1].ended, "logprobs": None}
            choices.append(choice | self.choice("".join(piece.text for piece in mine)))
        return self.head | {"object": self.whole, "choices": choices, "usage": self.usage(pieces)}

    def usage(self, pieces: Iterable[Piece]) -> dict[str, int]:
        """How many tokens went in and came out."""
        said, given = sum(piece.tokens for piece in pieces), sum(map(len, self.call.prompts))
        return {"prompt_tokens": given, "completion_tokens": said, "total_tokens": given + said}

    def events(self, piece: Piece) -> list[bytes]:
        """A piece as events: its text, and that the text has ended."""
        found = [self._event(piece.index, self.delta(piece.text), None)] if piece.text else []
        return found + ([self._event(piece.index, self.delta(""), piece.ended)] if piece.ended else [])

    def first(self) -> list[bytes]:
        """The events that a stream begins with."""
        count = len(self.call.prompts) * self.call.choices
        return [self._event(i, each, None) for i in range(count) for each in self.opening()]

    def last(self, pieces: Iterable[Piece]) -> list[bytes]:
        """The events that a stream ends with."""
        told = self.head | {"object": self.part, "choices": [], "usage": self.usage(pieces)}
        return [event(told), END] if self.call.usage else [END]

    def _event(self, index: int, delta: dict[str, Any], ended: str | None) -> bytes:
        choice = {"index": index, "finish_reason": ended, "logprobs": None} | delta
        return event(self.head | {"object": self.part, "choices": [choice]})


class Chat(Completion):
    """The answer to a request for a chat's next message."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def opening(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]
