"""Chats as a template writes them: a model's own or another, in the form of Hugging Face's, by jinja2, sandboxed."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from data.pretrained_tokenizer import CONFIG, TEMPLATE, PretrainedTokenizer
from data.tokenizers import Tokenizer
from runtime.errors import UserError
from runtime.extras import needs_package

Message = Mapping[str, str]  # its role (system, user or assistant) and its content
ROLES = ("system", "user", "assistant")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
LONGEST = 2**20  # characters that a template may make by repeating a text


# The form of Stanford Alpaca's prompts (Taori et al. 2023), for models without a template of their own.
GUIDE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% if m.input %}### Input:\n{{ m.input }}\n\n{% endif %}"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
# Nothing but what is asked, a line break, and the answer: the fewest tokens, for a model that has one task.
LINE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.input or m.content }}\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"guide": GUIDE, "line": LINE}
END_TEXT = "\n###"  # what ends an answer of a model whose tokenizer has no token for it
APART = re.compile(r"\.input\b|\[['\"]input['\"]\]")


class Piece(NamedTuple):
    """A part of a written chat, and whether the model says it."""

    text: str
    said: bool


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


class _Lengths:
    """`range` for a template, which in all may count up to `LONGEST`: two loops in one another end too."""

    def __init__(self) -> None:
        self.left = LONGEST

    def __call__(self, *numbers: int) -> range:
        found = range(*numbers)
        self.left -= len(found) + 1
        if self.left < 0:
            raise OverflowError("the template loops too long")
        return found


@functools.lru_cache(16)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


@dataclass(frozen=True)
class Template:
    """How chats are written for a model. source: in jinja2. special: the texts of its special tokens, by name.

    What an `input` says stands apart where the source asks for it, and else below what its message says.
    """

    source: str
    special: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, source: str, tokenizer: Tokenizer) -> Template:
        """A template with a tokenizer's special tokens."""
        texts = {name: tokenizer.special_text(name) for name in SPECIAL}
        if not tokenizer.stop_ids:
            texts["eos_token"] = END_TEXT
        return cls(source, tuple((name, text) for name, text in texts.items() if text is not None))

    @property
    def end(self) -> str:
        """What ends an answer where no token does."""
        return dict(self.special).get("eos_token", "")

    def write(self, messages: Sequence[Message], *, reply: bool = False) -> str:
        """A chat as text; with `reply`, up to where the assistant's answer begins.

        Raises UserError where the template cannot be read, or refuses these messages.
        """
        import jinja2

        if not APART.search(self.source):
            messages = [_joined(message) for message in messages]
        try:
            return _compiled(self.source).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=reply, range=_Lengths(),
                **dict(self.special),
            )  # fmt: skip
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise UserError(f"the chat template cannot be read: {error} (line {error.lineno})") from None
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, RecursionError, OverflowError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from None

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """A chat in the parts that a model is given and those that it says, in turn; where it does not end with an
        answer, up to where one begins.

        What is given is written as for a model that is to answer, so that training and inference agree. A template that
        writes older turns otherwise once newer ones follow has one part for all before the last answer.
        Raises UserError where the template does not write an answer after what it writes before one.
        """
        found, told = [], ""
        ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for end in ends if messages[-1]["role"] == "assistant" else [*ends, len(messages)]:
            given = self.write(messages[:end], reply=True)
            if not given.startswith(told):
                found, told = [], ""
            found.append(Piece(given[len(told) :], False))
            told = given
            if end < len(messages):
                told = self.write(messages[: end + 1])
                if not told.startswith(given) or told == given:
                    raise UserError("the chat template writes an answer otherwise than after its own prompt for one")
                found.append(Piece(told[len(given) :], True))
        return found


def _joined(message: Message) -> Message:
    if not (input := message.get("input")):
        return message
    return {"role": message["role"], "content": f"{message['content']}\n\n{input}"}


def own_template(tokenizer: Tokenizer) -> Template | None:
    """The chat template that came with a tokenizer; None where there is none."""
    found = tokenizer.template if isinstance(tokenizer, PretrainedTokenizer) else None
    if isinstance(found, list):  # of several by name, the one without a purpose of its own
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return Template.of(found, tokenizer) if isinstance(found, str) else None


def template_of(tokenizer: Tokenizer) -> Template:
    """The chat template that came with a tokenizer. Raises UserError where there is none."""
    if found := own_template(tokenizer):
        return found
    raise UserError(
        f"this model has no chat template ({TEMPLATE}, or chat_template in {CONFIG}), so it cannot chat; "
        "continue a text with --prompt"
    )


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a written chat (tokens,), and which of them the model says: an answer with the token that ends it,
    which is added where the template writes none, but nothing that the template writes after that token.

    Each piece is encoded by itself, so that a prompt's tokens do not depend on the answer.
    """
    ids, said = [], []
    for piece in pieces:
        found = tokenizer.encode_rendered(piece.text)
        ends = [i for i, token in enumerate(found) if token in tokenizer.stop_ids] if piece.said else []
        if piece.said and tokenizer.stop_ids and not ends:
            found, ends = [*found, tokenizer.stop_ids[0]], [len(found)]
        ids += found
        last = ends[-1] if ends else len(found)
        said += [piece.said and i <= last for i in range(len(found))]
    return np.array(ids, tokenizer.dtype), np.array(said, bool)


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], template: Template | None = None) -> list[int]:
    """A chat as token ids, up to where the assistant's answer begins. template: the model's own, unless given.

    Raises UserError for a special token in what a person wrote.
    """
    refuse_special(tokenizer, messages)
    return encode_pieces(tokenizer, (template or template_of(tokenizer)).pieces(messages))[0].tolist()


def refuse_special(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Raises UserError where a message has the text of a special token, which only the template may write."""
    for message in messages:
        if found := tokenizer.special_in(message["content"] + message.get("input", "")):
            raise UserError(f"a message of the {message['role']} has the special token {found!r}; take it out")


def shortened(
    tokenizer: Tokenizer, messages: Sequence[Message], longest: int, template: Template | None = None
) -> tuple[list[Message], list[int]]:
    """The messages without the oldest turns that do not fit, and the token ids; the system prompt always stays.

    Raises UserError where the last message alone is too long.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    while True:
        kept = [*system, *turns]
        if len(ids := encode_chat(tokenizer, kept, template)) <= longest:
            return kept, ids
        if len(turns) < 3:
            raise UserError(f"the message has {len(ids):,} tokens with what goes before it, and {longest:,} fit")
        turns = turns[2:]
