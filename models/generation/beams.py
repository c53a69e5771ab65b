"""Beam search: of all continuations so far, the likeliest few go on. Nothing is drawn.

Its rules are those of transformers' `generate(num_beams=N)` with its defaults: a finished text counts by the mean of
the logarithms of its tokens' probabilities, that of a stop token included, and the search ends where no text under way
is better than the worst of N finished ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora.merge import cached_weights
from models.generation.cache import KVCache
from models.generation.continuous import Made
from models.generation.sampling import evaluating, read


class Beam(NamedTuple):
    """A text: its new tokens, and the sum of the logarithms of their probabilities."""

    tokens: list[int]
    log_chance: float

    @property
    def score(self) -> float:
        """What finished texts are compared by."""
        return self.log_chance / len(self.tokens)


def _likeliest(logits_BV: Tensor, running: Sequence[Beam], count: int) -> list[tuple[int, Beam]]:
    """The likeliest texts that are one token longer, each with the number of the one that it goes on from."""
    sums_B1 = torch.tensor([[beam.log_chance] for beam in running])
    sums = (logits_BV.float().cpu().log_softmax(-1) + sums_B1).flatten()
    found = sums.topk(min(count, len(sums)))
    origins = [divmod(index, logits_BV.shape[1]) for index in found.indices.tolist()]
    return [
        (origin, Beam([*running[origin].tokens, token], value))
        for (origin, token), value in zip(origins, found.values.tolist(), strict=True)
    ]


def beam_search(
    model: nn.Module,
    prompt: Sequence[int],
    beams: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> Made:
    """The best continuation of a prompt (token ids) among those that so many beams find, and its score.

    Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("a prompt needs at least one token")
    cache = KVCache(model.config.n_layer, model.config.max_positions, model.token_embedding.weight.device)
    running, finished = [Beam([], 0.0)], []
    with evaluating(model), cached_weights(model):
        for _ in range(max_new_tokens):
            logits_BV = read(model, cache, [[*prompt, *beam.tokens] for beam in running])
            # So many that N go on even where each beam's likeliest tokens all end it.
            candidates = _likeliest(logits_BV, running, max(2, 1 + len(stop_ids)) * beams)
            last = len(candidates[0][1].tokens) == max_new_tokens
            ending = [last or beam.tokens[-1] in stop_ids for _, beam in candidates]
            finished += [beam for (_, beam), ends in zip(candidates[:beams], ending, strict=False) if ends]
            finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
            going_on = [each for each, ends in zip(candidates, ending, strict=True) if not ends][:beams]
            if not going_on or (len(finished) == beams and going_on[0][1].score <= finished[-1].score):
                break
            running = [beam for _, beam in going_on]
            _follow(cache, [origin for origin, _ in going_on])
    tokens = finished[0].tokens
    return Made(tokens[:-1] if tokens[-1] in stop_ids else tokens, finished[0].score)


@torch.inference_mode()
def _follow(cache: KVCache, origins: list[int]) -> None:
    """Give each text the keys and values of the one that it goes on from."""
    if origins != list(range(len(cache.lengths))):
        cache.reorder(origins)
