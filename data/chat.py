"""Chats as a model's own template writes them: Hugging Face's chat templates, by jinja2 in its sandbox."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from data.pretrained_tokenizer import CONFIG, TEMPLATE, PretrainedTokenizer
from data.tokenizers import Tokenizer
from runtime.errors import UserError
from runtime.extras import needs_package

Message = Mapping[str, str]  # its role (system, user or assistant) and its content
ROLES = ("system", "user", "assistant")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
LONGEST = 2**20  # characters that a template may make by repeating a text


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template that came with a tokenizer. Raises UserError where there is none."""
    found = tokenizer.template if isinstance(tokenizer, PretrainedTokenizer) else None
    if isinstance(found, list):  # of several by name, the one without a purpose of its own
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    if not isinstance(found, str):
        raise UserError(
            f"this model has no chat template ({TEMPLATE}, or chat_template in {CONFIG}), so it cannot chat; "
            "continue a text with --prompt"
        )
    return found


@functools.cache
def _environment() -> Any:
    with needs_package("jinja2", "pretrained"):
        import jinja2
        import jinja2.ext
        import jinja2.sandbox

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Jinja's sandbox, in which no template makes a text that fills the memory."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context, operator, left, right):
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
            if (operator == "**" and max(sizes) > 64) or (not numbers and sizes[0] * sizes[1] > LONGEST):
                raise jinja2.exceptions.SecurityError("the template makes too long a text")
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the model itself says; here it is let through."""

        tags = {"generation"}  # noqa: RUF012 - as jinja has it

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_through"), [], [], body).set_lineno(line)

        def _through(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    found = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    found.filters["tojson"] = _to_json
    found.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return found


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own escapes what has a meaning in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(tokenizer: PretrainedTokenizer, messages: Sequence[Message], *, reply: bool = True) -> str:
    """A chat as its model's template writes it; with `reply`, up to where the assistant's answer begins.

    Raises UserError where there is no template, or where it refuses these messages.
    """
    template, environment = template_of(tokenizer), _environment()
    import jinja2

    special = {name: text for name in SPECIAL if (text := tokenizer.special_text(name)) is not None}
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=reply, **special
        )
    except (jinja2.exceptions.TemplateError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"the chat template refuses these messages: {error}") from None


def encode_chat(tokenizer: PretrainedTokenizer, messages: Sequence[Message]) -> list[int]:
    """A chat as token ids, up to where the assistant's answer begins."""
    return tokenizer.encode_rendered(render(tokenizer, messages))


def shortened(
    tokenizer: PretrainedTokenizer, messages: Sequence[Message], longest: int
) -> tuple[list[Message], list[int]]:
    """The messages without the oldest turns that do not fit, and the token ids; the system prompt always stays.

    Raises UserError where the last message alone is too long.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    while True:
        kept = [*system, *turns]
        if len(ids := encode_chat(tokenizer, kept)) <= longest:
            return kept, ids
        if len(turns) < 3:
            raise UserError(f"the message has {len(ids):,} tokens with what goes before it, and {longest:,} fit")
        turns = turns[2:]
