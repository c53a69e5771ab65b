"""Prompts to continue: a file of JSON lines, one prompt a line, each with adapters of its own if it names any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.chat import ROLES, Message, Template, encode_chat
from data.jsonlines import read_json_lines
from data.tokenizers import Tokenizer, listed
from jobs.generating.choice import parse_adapters
from lora.attach import Strengths
from runtime.errors import UserError

KEYS = ("prompt", "messages", "adapter", "max_new_tokens")


@dataclass(frozen=True)
class Request:
    """A text to continue, or a chat to answer, the adapters for it, and the tokens that it may have.

    None leaves adapters and tokens to the command line. where: for messages of ours.
    """

    prompt: str
    adapters: Strengths | None = None
    where: str = ""
    messages: tuple[Message, ...] = ()
    max_new_tokens: int | None = None


def _request(value: dict[str, Any], where: str) -> Request:
    if unknown := sorted(value.keys() - set(KEYS)):
        raise UserError(f"{where}: {', '.join(map(repr, unknown))} is not a key here; there are {', '.join(KEYS)}")
    if "messages" in value:
        if "prompt" in value:
            raise UserError(f"{where}: prompt and messages are both there; a line has one of them")
        request = Request("", None, where, messages_of(value["messages"], where))
    elif isinstance(value.get("prompt"), str):
        request = Request(value["prompt"], None, where)
    else:
        raise UserError(f"{where}: {'prompt must be text' if 'prompt' in value else 'prompt is missing'}")
    if "max_new_tokens" in value:
        if type(count := value["max_new_tokens"]) is not int or count < 1:
            raise UserError(f"{where}: max_new_tokens must be a whole number, at least 1")
        request = replace(request, max_new_tokens=count)
    if "adapter" not in value:
        return request
    if not isinstance(value["adapter"], str):
        raise UserError(f"{where}: adapter must be text, a name or none")
    try:
        return replace(request, adapters=parse_adapters([value["adapter"]]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def messages_of(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of a chat. Raises UserError for what is none."""
    good = isinstance(value, list) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
        for message in value
    )
    if not good or not value:
        raise UserError(f'{where}: messages must be a list of {{"role": "{" or ".join(ROLES)}", "content": "..."}}')
    return tuple(value)


def read_requests(path: Path) -> list[Request]:
    """The prompts of a file of JSON lines: {"prompt": text}, or with `messages`, a chat, in place of the prompt; and if
    they are given, `adapter`, a LoRA run's name or none, and `max_new_tokens`.

    Raises UserError that names the line for anything else.
    """
    requests = [_request(value, where) for where, value in read_json_lines(path)]
    if not requests:
        raise UserError(f"{path} holds no prompts")
    return requests


def encode(tokenizer: Tokenizer, template: Template | None, request: Request) -> list[int]:
    """A prompt as token ids, at least one. Raises UserError for characters that the tokenizer does not know."""
    if request.messages:
        try:
            return encode_chat(tokenizer, request.messages, template)
        except UserError as error:
            raise UserError(f"{request.where}: {error}" if request.where else str(error)) from None
    if unknown := tokenizer.unknown(request.prompt):
        where = f"{request.where}: " if request.where else ""
        known = "".join(token.decode() for token in tokenizer.tokens if not token.isascii())
        others = f" and {known if len(known) <= 60 else f'{len(known)} others'}" if known else ""
        raise UserError(
            f"{where}the tokenizer has no {listed(unknown)}; it knows the characters of ASCII{others}; leave out what "
            "it lacks, or name a run on a text that has it with --run"
        )
    return tokenizer.encode(request.prompt or "\n")
