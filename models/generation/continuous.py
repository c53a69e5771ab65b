"""Continuous batching: a row that has finished makes room for the next text, so that every pass is full of rows.

Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora.layers.inference import Mix
from lora.merge import cached_weights
from models.generation.cache import KVCache
from models.generation.choosing import Sampling, choose
from models.generation.sampling import evaluating, run_pass, window


def never(token: int) -> bool:
    """Whether a text ends with this token: none does."""
    return False


@dataclass(frozen=True)
class Asked:
    """A text that is wanted: what it continues (token ids), by how many tokens at most, the seed of its draws, and how
    they are drawn.

    watch() makes what is told of each token, and says whether the text ends with that one. adapters: the strengths of
    those that it goes through, which count in a mix.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    seed: int
    how: Sampling = Sampling()
    watch: Callable[[], Callable[[int], bool]] = lambda: never
    adapters: Mapping[str, float] = field(default_factory=dict)


class Made(NamedTuple):
    """A text's new tokens, up to the stop token where one came, and how likely the model found them: the mean of the
    logarithms of their probabilities, that of the stop token included, before temperature and filters; or None where
    that was not asked for."""

    tokens: list[int]
    log_likelihood: float | None = None


class Row:
    """A text that is being made, in a place of the batch."""

    def __init__(self, number: int, asked: Asked) -> None:
        self.number, self.asked, self.text = number, asked, list(asked.prompt)
        self.generator, self.ends = torch.Generator().manual_seed(asked.seed), asked.watch()
        self.log_chances: list[float] = []

    @property
    def left(self) -> int:
        """How many more tokens it may have."""
        return self.asked.max_new_tokens + len(self.asked.prompt) - len(self.text)

    def add(self, token: int) -> Made | None:
        """One more token; the whole text if it ends there."""
        self.text.append(token)
        stopped = token in self.asked.how.stop_ids
        if not (stopped or self.ends(token) or not self.left):
            return None
        mean = sum(self.log_chances) / len(self.log_chances) if self.log_chances else None
        return Made(self.text[len(self.asked.prompt) : len(self.text) - stopped], mean)


class Batch:
    """The places of a batch, and the rows in them, which go through adapters of their own if there is a mix.

    A window of several pieces can be read between the passes of the other rows, as in Agrawal et al. 2024, "Taming
    Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", arXiv 2403.02310.
    """

    def __init__(self, model: nn.Module, places: int, mix: Mix | None = None, pieces: int = sys.maxsize) -> None:
        """pieces: how many are read of such windows, all together, before the other rows go on."""
        self.model, self.mix, self.device = model, mix, model.token_embedding.weight.device
        self.cache = KVCache(model.config.n_layer, model.config.max_positions, self.device)
        self.cache.open_places(places)
        self.rows: list[Row | None] = [None] * places
        self.pieces, self.reading = pieces, dict[tuple[int, ...], KVCache]()  # by places: what has been read so far

    def window(self, row: Row) -> list[int]:
        """What the model sees of a text."""
        return window(row.text, self.cache.block_size)

    @torch.inference_mode()
    def advance(self, new: dict[int, Row]) -> Tensor | None:
        """Take new rows into empty places, and give all rows one more pass: logits (places, V), which do not count for
        rows that are still being read; None where all are."""
        full = [place for place, length in enumerate(self.cache.lengths) if length == self.cache.block_size]
        logits = None
        if any(0 < length < self.cache.block_size for length in self.cache.lengths):
            tokens = [row.text[-1] if row else 0 for row in self.rows]
            logits = self._pass(range(len(tokens)), self.cache, self.cache.advance(tokens))
        for place, row in new.items():
            self.rows[place] = row
        self._begin([*full, *new])
        return self._read(logits)

    def _pass(self, places: Iterable[int], cache: KVCache, tokens: Tensor) -> Tensor:
        """One pass of the rows in these places: the logits of each row's last position (rows, V)."""
        if self.mix:
            self.mix.take([row.asked.adapters if (row := self.rows[place]) else {} for place in places])
        return run_pass(self.model, cache, tokens)

    def _begin(self, places: list[int]) -> None:
        """The windows of these places are to be read from their beginning.

        On the CPU that is done row by row: it takes no longer, there is no padding, and what a row gets does not depend
        on which rows are read with it.
        """
        together = 1 if self.device.type == "cpu" else max(1, len(places))
        for i in range(0, len(places), together):
            self.reading[tuple(places[i : i + together])] = self.cache.emptied()
        for some in ([place for place, row in enumerate(self.rows) if row is None], *self.reading):
            self.cache.empty(some)

    def _read(self, logits: Tensor | None) -> Tensor | None:
        """Read on: all windows of one piece, and so many pieces of the others as may be, those of the first first."""
        left = self.pieces
        for places, fresh in list(self.reading.items()):
            windows = [self.window(self.rows[place]) for place in places]
            starts = now = range(max(fresh.lengths, default=0), max(map(len, windows)), fresh.piece)
            if starts.stop > fresh.piece:
                now = starts[:left]
                left -= len(now)
            for start in now:
                found = self._pass(places, fresh, fresh.begin(windows, start))
            if now == starts:
                logits = found.new_zeros(len(self.rows), found.shape[1]) if logits is None else logits
                logits[list(places)] = found
                self.cache.replace(list(places), fresh)
                del self.reading[places]
        return logits

    def choose(self, logits: Tensor | None, scored: bool) -> Iterator[tuple[Row, Made | None]]:
        """A token for each row that has been read, and its text if that ends there, which empties its place."""
        filled: dict[Sampling, list[int]] = {}
        for place, row in enumerate(self.rows):
            if row and self.cache.lengths[place]:
                filled.setdefault(row.asked.how, []).append(place)
        for how, places in filled.items():
            yield from self._choose(places, logits[places], how, scored)

    def _choose(
        self, places: list[int], logits: Tensor, how: Sampling, scored: bool
    ) -> Iterator[tuple[Row, Made | None]]:
        """The same for the rows in some places, which draw alike."""
        rows = [self.rows[place] for place in places]
        seen = [self.window(row) for row in rows] if how.repetition_penalty != 1 else [[]] * len(rows)
        tokens = choose(logits, seen, how, [row.generator for row in rows])
        chances = logits.float().log_softmax(-1).cpu() if scored else None
        for i, (place, row, token) in enumerate(zip(places, rows, tokens, strict=True)):
            if scored:
                row.log_chances.append(float(chances[i, token]))
            if made := row.add(token):
                self.release(place)
            yield row, made

    def release(self, place: int) -> None:
        """Empty a place."""
        self.rows[place] = None
        self.reading.pop((place,), None)
        self.cache.empty([place])


def continue_all(
    model: nn.Module,
    asked: Sequence[Asked],
    places: int,
    mix: Mix | None = None,
    scored: bool = False,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, Made]]:
    """The texts, each with its number among those asked for, as they are finished: the longest begin first.

    mix: of `lora.mixing`, for texts with adapters of their own; else they go through those that are active. A text
    depends on its prompt, its seed and, by the rounding of matmuls, on the number of places; on the CPU not on
    what else is asked for. tell(n): n more tokens are made, or will not be needed. As for `stream`, the model is in
    evaluation mode until this ends. Raises ValueError for an empty prompt.
    """
    if not all(each.prompt for each in asked):
        raise ValueError("a prompt needs at least one token")
    waiting = sorted(range(len(asked)), key=lambda i: -asked[i].max_new_tokens)[::-1]
    batch = Batch(model, places, mix)
    with evaluating(model), cached_weights(model):
        while waiting or any(batch.rows):
            free = [place for place, row in enumerate(batch.rows) if row is None][: len(waiting)]
            new = {place: Row(number, asked[number]) for place in free for number in [waiting.pop()]}
            made = list(batch.choose(batch.advance(new), scored))
            tell(sum(1 if text is None else 1 + row.left for row, text in made))
            yield from ((row.number, text) for row, text in made if text)
