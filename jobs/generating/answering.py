"""Answers to records: what a model says after the prompts that it would have been trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from data.chat import Template
from data.instructions.encoding import encode_prompt
from data.instructions.records import Record
from data.tokenizers import Tokenizer
from jobs.generating.stopping import cut
from models.generation.sampling import Sampling, stream
from models.transformer import Transformer
from runtime.device import Machine
from runtime.processes.world import Step, world

TOGETHER = 32  # prompts that are answered at a time: those of similar length


class Answer(NamedTuple):
    """What a model says, and whether it came to an end within the tokens that it had."""

    text: str
    ended: bool


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    template: Template,
    records: Sequence[Record],
    how: Sampling,
    longest: int,
    machine: Machine,
    seed: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """An answer to each record's prompt, of at most `longest` tokens, up to where it ends. how: its stop tokens are the
    tokenizer's. Several processes share out the batches, which are those of one. tell(done, total) is called as the
    work goes on."""
    prompts = [prompt_tokens(record, template, tokenizer, model) for record in records]
    how, found = replace(how, stop_ids=tokenizer.stop_ids), {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]

    def answered(chosen: list[int], step: Step) -> list[Answer]:
        tokens = stream(model, [prompts[i] for i in chosen], longest, how, seed)
        with machine.autocast():
            return _answers(tokens, len(chosen), tokenizer, template.end, longest, step)

    for chosen, made in zip(batches, world().shared_out(batches, answered, tell, longest), strict=True):
        found |= zip(chosen, (Answer(*each) for each in made), strict=True)
    return [found[i] for i in range(len(prompts))]


def prompt_tokens(record: Record, template: Template, tokenizer: Tokenizer, model: Transformer) -> list[int]:
    """What a model is given of a record. A prompt that is as long as the context loses its beginning."""
    room = model.config.max_positions - 1
    return encode_prompt(record, template, tokenizer)[-max(1, room) :]


def _answers(
    tokens: Iterator[list[int | None]], rows: int, tokenizer: Tokenizer, end: str, longest: int,
    step: Step,
) -> list[Answer]:  # fmt: skip
    """The answers in rows of tokens as they are made; where no token ends them, up to the text that does."""
    made: list[list[int]] = [[] for _ in range(rows)]
    for i, new in enumerate(tokens, 1):
        for row, token in zip(made, new, strict=True):
            row += [] if token is None else [token]
        if not tokenizer.stop_ids and all(end in tokenizer.decode(row) for row in made):
            tokens.close()
            break
        step(i)
    texts = [tokenizer.decode(row) for row in made]
    if tokenizer.stop_ids:
        return [Answer(text, len(row) < longest) for text, row in zip(texts, made, strict=True)]
    return [Answer(cut(text, [end]), end in text) for text in texts]
