"""Texts for many requests, by any strategy: drawn, the likeliest of several drawn ones, or found by beam search."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from data.tokenizers import Tokenizer
from jobs.generating.results import Results
from jobs.generating.stopping import StopAt, cut
from lora.attach import Strengths, adapter_parameters, using
from models.generation.beams import beam_search
from models.generation.choosing import Sampling
from models.generation.continuous import Asked, Made
from models.generation.per_row import generate_per_row, shared_batches
from models.transformer import Transformer
from runtime.processes.world import world

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Wanted:
    """A text that is wanted: what it continues (token ids), by how many tokens at most, through which adapters as the
    model calls them, and the seed of its draws; where several are drawn, of the first of them."""

    prompt: Sequence[int]
    adapters: Strengths
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Strategy:
    """How texts are made: as `how` says, the best of so many drawn ones, or if beams are given, by that many beams.
    stops: texts that end one."""

    how: Sampling
    best_of: int = 1
    beams: int | None = None
    stops: Sequence[str] = ()


class Writer:
    """Makes texts with a model and its tokenizer."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, strategy: Strategy) -> None:
        self.model, self.tokenizer, self.strategy = model, tokenizer, strategy

    def in_order(
        self, wanted: Sequence[Wanted], results: Results, tell: Callable[[int, int], None] = lambda done, total: None
    ) -> list[str]:
        """All texts, on all processes, which share them out; those that `results` does not have are made, and given to
        it as they come. tell(done, total) is told of the tokens of this process."""
        keys = [(sorted(each.adapters.items()), -each.max_new_tokens, len(each.prompt)) for each in wanted]
        missing = sorted(set(range(len(wanted))) - results.texts.keys(), key=keys.__getitem__)
        mine, made = missing[world().rank :: world().size], {}
        done, total = 0, sum(wanted[i].max_new_tokens for i in mine) * self.strategy.best_of

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            tell(done, total)

        make = self._by_beams if self.strategy.beams else self._drawn
        for number, tokens in make(wanted, mine, count):
            made[number] = cut(self.tokenizer.decode(tokens), self.strategy.stops)
            results.add(number, made[number])
        found = results.texts | {i: text for some in world().gather(list(made.items())) for i, text in some}
        return [found[i] for i in range(len(wanted))]

    def fingerprint(self, wanted: Sequence[Wanted], base: str, dtype: torch.dtype) -> str:
        """Of all that makes the texts what they are. base: the fingerprint of the base's weights."""
        own, digest = adapter_parameters(self.model), hashlib.sha256()
        digest.update(repr((base, wanted, self.strategy, dtype)).encode())
        for tensor in self.model.parameters():
            if tensor in own:
                digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _drawn(self, wanted: Sequence[Wanted], mine: Sequence[int], tell: Tell) -> Iterator[tuple[int, list[int]]]:
        """The texts of some numbers, each the likeliest of those drawn for it."""
        each_of, how = range(self.strategy.best_of), self.strategy.how
        asked = [
            Asked(text.prompt, text.max_new_tokens, text.seed + j, how, self._watch, text.adapters)
            for text in (wanted[i] for i in mine)
            for j in each_of
        ]
        batches = shared_batches([each.adapters for each in wanted for _ in each_of])
        drawn: dict[int, dict[int, Made]] = {i: {} for i in mine}
        for at, made in generate_per_row(self.model, asked, batches, len(each_of) > 1, tell):
            number = mine[at // len(each_of)]
            drawn[number][at] = made
            if len(drawn[number]) == len(each_of):
                found = [made for _, made in sorted(drawn.pop(number).items())]
                yield number, found[0].tokens if len(found) == 1 else likeliest(found).tokens

    def _by_beams(self, wanted: Sequence[Wanted], mine: Sequence[int], tell: Tell) -> Iterator[tuple[int, list[int]]]:
        """The texts of some numbers, each by a beam search of its own."""
        for i in mine:
            with using(self.model, wanted[i].adapters):
                how = self.strategy.beams, wanted[i].max_new_tokens, self.strategy.how.stop_ids
                found = beam_search(self.model, wanted[i].prompt, *how)
            tell(wanted[i].max_new_tokens)
            yield i, found.tokens

    def _watch(self) -> Callable[[int], bool]:
        """What is told of a text's tokens and says whether one of the stops has come."""
        if not self.strategy.stops:
            return lambda token: False
        decoder, until = self.tokenizer.stream(), StopAt(self.strategy.stops)

        def ends(token: int) -> bool:
            until.feed(decoder.feed(token))
            return until.ended

        return ends


def likeliest(texts: Sequence[Made]) -> Made:
    """The text whose tokens are the likeliest on average, the first of equals."""
    return max(texts, key=lambda made: made.log_likelihood)
