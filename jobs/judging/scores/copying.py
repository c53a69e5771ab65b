"""How much of an answer was learned by heart: its runs of words in a single training output."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from jobs.judging.scores.words import words

N = 8  # words in a row

Run = tuple[str, ...]


def _runs(found: Sequence[str], n: int) -> set[Run]:
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def overlaps(answers: Sequence[str], outputs: Iterable[str]) -> list[float | None]:
    """For each answer the largest share of its runs of N words (of all its words, where it has fewer) that one and the
    same training output has: 1 is word for word. None for an answer without words.

    Only the answers' own runs are held, so that the training outputs may be many.
    """
    split = [words(answer) for answer in answers]
    own = [_runs(found, min(N, len(found))) if found else set() for found in split]
    having: dict[Run, list[int]] = defaultdict(list)
    for i, runs in enumerate(own):
        for run in runs:
            having[run].append(i)
    lengths, most = sorted({len(run) for run in having}), [0] * len(split)
    for output in outputs:
        found, shared = words(output), Counter()
        for n in lengths:
            shared.update(i for run in _runs(found, n) for i in having.get(run, ()))
        for i, count in shared.items():
            most[i] = max(most[i], count)
    return [count / len(runs) if runs else None for count, runs in zip(most, own, strict=True)]
