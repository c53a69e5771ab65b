"""Texts that end where a certain text comes, however its characters are spread over tokens."""

from __future__ import annotations

from collections.abc import Sequence


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stops in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


class StopAt:
    """Passes a text on piece by piece, but for what may be the beginning of a stop."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.ended = stops, "", False

    def feed(self, text: str) -> str:
        """What is certain to come before any stop; `ended` is set once one has come."""
        self.held += text
        whole = cut(self.held, self.stops)
        if len(whole) < len(self.held):
            self.ended, self.held = True, ""
            return whole
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        certain = self.held[: len(self.held) - keep]
        self.held = self.held[len(certain) :]
        return certain

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        rest, self.held = self.held, ""
        return rest
