"""A chat in the terminal: what the person types, and what the model answers, as it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from data.chat import Message, Template, shortened
from data.tokenizers import Tokenizer
from runtime.console import say


def typed() -> Iterator[str]:
    """The lines that a person types, without empty ones, until the input ends."""
    while True:
        if sys.stdin.isatty():
            print("\n> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


def chat(
    tokenizer: Tokenizer, template: Template, system: str, longest: int, answer: Callable[[list[int]], str]
) -> None:
    """Talk until the input ends. longest: tokens of a chat that leave room for an answer; answer(token ids) prints one
    and returns it.

    Raises UserError for a message that is too long.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    if sys.stdin.isatty():
        say("Type a message; Ctrl-D ends the chat")
    for line in typed():
        messages.append({"role": "user", "content": line})
        kept, ids = shortened(tokenizer, messages, longest, template)
        if len(kept) < len(messages):
            say(f"(the {len(messages) - len(kept)} oldest messages no longer fit, and are forgotten)")
        messages = [*kept, {"role": "assistant", "content": answer(ids)}]
