"""Texts that each go through adapters of their own, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from lora.attach import using
from lora.layers.inference import Mix
from lora.mixing import mixing
from models.generation.continuous import Asked, Made, continue_all
from models.transformer import Transformer

AT_ONCE = 64  # rows of a batch, so that its cache fits into memory


class SharedBatch(NamedTuple):
    """A batch: the choices of adapters whose texts are in it, and its places."""

    choices: tuple[Mapping[str, float], ...]
    places: int


def shared_batches(adapters: Sequence[Mapping[str, float]]) -> list[SharedBatch]:
    """How texts with these adapters share batches. Those that fill one alone have it to themselves, since a pass with
    effective weights is the fastest; the others share batches, so that these are full too."""
    counts: dict[tuple, int] = {}
    for strengths in adapters:
        key = tuple(strengths.items())
        counts[key] = counts.get(key, 0) + 1
    batches, together, rows = [], [], 0
    for key, count in counts.items():
        if count >= AT_ONCE:
            batches.append(SharedBatch((dict(key),), AT_ONCE))
            continue
        together, rows = [*together, dict(key)], rows + count
        if rows >= AT_ONCE:
            batches.append(SharedBatch(tuple(together), AT_ONCE))
            together, rows = [], 0
    return [*batches, SharedBatch(tuple(together), rows)] if together else batches


@contextmanager
def _through(model: Transformer, choices: Sequence[Mapping[str, float]]) -> Iterator[Mix | None]:
    """A mix for the rows of a batch, or none where all go through the same adapters, which are then active."""
    if len(choices) == 1:
        with using(model, dict(choices[0])):
            yield None
        return
    with mixing(model, list(dict.fromkeys(name for choice in choices for name in choice))) as mix:
        yield mix


def generate_per_row(
    model: Transformer,
    asked: Sequence[Asked],
    batches: Sequence[SharedBatch] | None = None,
    scored: bool = False,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, Made]]:
    """The texts, each with its number, as they are finished: each with its own adapters, as if it were alone, but for
    the rounding of matmuls.

    batches: of `shared_batches` for a longer list that these are part of, so that they get the bits that they get
    there. tell(n): n more tokens are made, or will not be needed. Raises UsageError for an adapter that is not
    attached.
    """
    for choices, places in batches or shared_batches([each.adapters for each in asked]):
        numbers = [i for i, each in enumerate(asked) if each.adapters in choices]
        with _through(model, choices) as mix:
            texts = continue_all(model, [asked[i] for i in numbers], places, mix, scored, tell)
            yield from ((numbers[i], made) for i, made in texts)
