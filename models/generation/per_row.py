"""Batches whose rows each go through adapters of their own, for inference; rows with the same are taken together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lora.attach import Strengths, using
from models.generation.choosing import Sampling
from models.generation.sampling import stream
from models.transformer import Transformer
from runtime.processes.world import Step, world

AT_ONCE = 64  # rows, so that the cache of a long list of prompts fits into memory


def grouped(adapters: Sequence[Strengths]) -> Iterator[tuple[Strengths, list[int]]]:
    """Adapters, and rows that want them: at most AT_ONCE of them."""
    groups: dict[tuple, list[int]] = {}
    for row, strengths in enumerate(adapters):
        groups.setdefault(tuple(strengths.items()), []).append(row)
    for strengths, rows in groups.items():
        for i in range(0, len(rows), AT_ONCE):
            yield dict(strengths), rows[i : i + AT_ONCE]


def generate_per_row(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Strengths],
    max_new_tokens: int,
    how: Sampling,
    seeds: Sequence[int],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """The continuations of prompts (token ids), each with its own adapters and seed, as if each were alone.

    Several processes share out the batches, which are those of one: a matmul of fewer rows may round otherwise.
    tell(done, total) is called as the work goes on. Raises UsageError for an adapter that is not attached.
    """
    groups = list(grouped(adapters))

    def continued(group: tuple[Strengths, list[int]], step: Step) -> list[list[int]]:
        strengths, rows = group
        made: list[list[int]] = [[] for _ in rows]
        with using(model, strengths):
            some = [prompts[row] for row in rows], max_new_tokens, how, [seeds[row] for row in rows]
            for done, tokens in enumerate(stream(model, *some), 1):
                for each, token in zip(made, tokens, strict=True):
                    each += [] if token is None else [token]
                step(done)
        return made

    found = {}
    for (_, rows), made in zip(groups, world().shared_out(groups, continued, tell, max_new_tokens), strict=True):
        found |= zip(rows, made, strict=True)
    return [found[row] for row in range(len(prompts))]
