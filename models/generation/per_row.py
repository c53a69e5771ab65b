"""Texts that each go through adapters of their own, for inference; those with the same are made together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lora.attach import Strengths, using
from models.generation.choosing import Sampling
from models.generation.continuous import Asked, Made, continue_all
from models.transformer import Transformer

AT_ONCE = 64  # rows of a batch, so that its cache fits into memory


def _key(strengths: Strengths) -> tuple:
    return tuple(strengths.items())


def places_by_adapters(adapters: Sequence[Strengths]) -> dict[tuple, int]:
    """How many rows the batch of each choice of adapters has: AT_ONCE, or as many as want them."""
    wanted = [_key(strengths) for strengths in adapters]
    return {key: min(AT_ONCE, wanted.count(key)) for key in dict.fromkeys(wanted)}


def generate_per_row(
    model: Transformer,
    asked: Sequence[Asked],
    adapters: Sequence[Strengths],
    how: Sampling,
    scored: bool = False,
    places: dict[tuple, int] | None = None,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, Made]]:
    """The texts, each with its number, as they are finished: each with its own adapters, as if it were alone.

    places: of `places_by_adapters` for a longer list that these are part of, so that they get the bits that they get
    there. tell(n): n more tokens are made, or will not be needed. Raises UsageError for an adapter that is not
    attached.
    """
    places, groups = places or places_by_adapters(adapters), {}
    for i, strengths in enumerate(adapters):
        groups.setdefault(_key(strengths), []).append(i)
    for key, numbers in groups.items():
        with using(model, dict(key)):
            texts = continue_all(model, [asked[i] for i in numbers], how, places[key], scored, tell)
            yield from ((numbers[i], made) for i, made in texts)
