"""Answers to records: what a model says after the prompts that it would have been trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from data.chat import Template
from data.instructions.encoding import encode_prompt
from data.instructions.records import Record
from data.tokenizers import Tokenizer
from jobs.generating.stopping import cut
from models.generation.sampling import Sampling, stream
from models.transformer import Transformer
from runtime.device import Machine

TOGETHER = 32  # prompts that are answered at a time: those of similar length


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    template: Template,
    records: Sequence[Record],
    how: Sampling,
    longest: int,
    machine: Machine,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """A text for each record's prompt, of at most `longest` tokens, up to where an answer ends. how: its stop tokens
    are the tokenizer's. A prompt that is as long as the context loses its beginning."""
    room = model.config.max_positions - 1
    prompts = [encode_prompt(record, template, tokenizer)[-max(1, room) :] for record in records]
    how, found = replace(how, stop_ids=tokenizer.stop_ids), {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for chosen in (order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)):
        tokens = stream(model, [prompts[i] for i in chosen], longest, how, seed)
        with machine.autocast():
            found |= zip(chosen, _texts(tokens, len(chosen), tokenizer, template.end), strict=True)
        progress(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


def _texts(tokens: Iterator[list[int | None]], rows: int, tokenizer: Tokenizer, end: str) -> list[str]:
    """The texts of rows of tokens as they are made; where no token ends them, up to the text that does."""
    made: list[list[int]] = [[] for _ in range(rows)]
    for new in tokens:
        for row, token in zip(made, new, strict=True):
            row += [] if token is None or token in tokenizer.stop_ids else [token]
        if not tokenizer.stop_ids and all(end in tokenizer.decode(row) for row in made):
            tokens.close()
            break
    texts = map(tokenizer.decode, made)
    return list(texts) if tokenizer.stop_ids else [cut(text, [end]) for text in texts]
