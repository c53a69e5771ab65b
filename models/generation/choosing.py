"""Choosing the next token of each row from its logits: filters, then a draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]  # one for all rows, or one a row


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    temperature: divides the logits; 0 is greedy. top_k: keep the k likeliest. top_p: keep the likeliest that together
    reach this probability (Holtzman et al. 2019, arXiv 1904.09751). min_p: keep those that are at least this times as
    likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082). repetition_penalty: above 0; logits of tokens in
    the window are divided (where positive) or multiplied by it (Keskar et al. 2019, arXiv 1909.05858).
    greedy: the likeliest token, always. stop_ids: tokens that end a text.

    Raises ValueError for a value that makes no sense, by name.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    greedy: bool = False
    stop_ids: tuple[int, ...] = ()
    min_p: float | None = None

    def __post_init__(self) -> None:
        rules = {
            f"temperature={self.temperature}: must be at least 0": self.temperature >= 0,
            f"top_k={self.top_k}: must be at least 1": self.top_k is None or self.top_k >= 1,
            f"top_p={self.top_p}: must be above 0": self.top_p is None or self.top_p > 0,
            f"min_p={self.min_p}: must be from 0 to 1": self.min_p is None or 0 <= self.min_p <= 1,
            f"repetition_penalty={self.repetition_penalty}: must be above 0": self.repetition_penalty > 0,
        }
        for message, holds in rules.items():
            if not holds:
                raise ValueError(message)


def _penalise(logits_BV: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> None:
    for row, tokens in zip(logits_BV, seen, strict=True):
        index = torch.tensor(sorted(set(tokens)), dtype=torch.long)
        row[index] = torch.where(row[index] > 0, row[index] / penalty, row[index] * penalty)


def _keep_nucleus(logits_BV: Tensor, top_p: float) -> None:
    ordered, index = logits_BV.sort(descending=True)
    chances = ordered.softmax(-1)
    reached_before = chances.cumsum(-1) - chances  # the likeliest token always stays: nothing comes before it
    logits_BV.scatter_(-1, index, ordered.masked_fill(reached_before >= top_p, -math.inf))


def _exponential(like_BV: Tensor, generators: Generators) -> Tensor:
    """Draws from Exp(1); a row with a generator of its own gets what it would get alone."""
    if isinstance(generators, torch.Generator):
        return torch.empty_like(like_BV).exponential_(generator=generators)
    rows = zip(like_BV, generators, strict=True)
    return torch.stack([torch.empty_like(row).exponential_(generator=generator) for row, generator in rows])


def choose(logits_BV: Tensor, seen: Sequence[Sequence[int]], how: Sampling, generators: Generators) -> list[int]:
    """The next token of each row, from its logits (B, V); `seen` is each row's window, for a
    repetition penalty.

    Sampling happens on the CPU in fp32: one seed draws alike on every device, and MPS draws wrongly (nanoGPT 273).
    """
    logits_BV = logits_BV.float().cpu().clone()
    if how.repetition_penalty != 1:
        _penalise(logits_BV, seen, how.repetition_penalty)
    if how.greedy or not how.temperature:
        return logits_BV.argmax(-1).tolist()
    logits_BV /= how.temperature
    if how.top_k is not None and how.top_k < logits_BV.shape[-1]:
        logits_BV[logits_BV < logits_BV.topk(how.top_k).values[:, -1:]] = -math.inf
    if how.top_p is not None and how.top_p < 1:
        _keep_nucleus(logits_BV, how.top_p)
    if how.min_p:
        least_B1 = logits_BV.max(-1, keepdim=True).values + math.log(how.min_p)
        logits_BV[logits_BV < least_B1] = -math.inf
    # What torch.multinomial does for one draw, without its checks, which take longer than all the rest.
    chances_BV = logits_BV.softmax(-1)
    return (chances_BV / _exponential(chances_BV, generators)).argmax(-1).tolist()
