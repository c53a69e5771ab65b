"""Texts that are nearly the same, by MinHash (Broder 1997; the package datasketch) and banded signatures.

A text is the set of its three-word runs, and two texts are near where they share THRESHOLD of these (Jaccard). Longer
runs miss short records: of 30 words, one changed word leaves 0.81 of the runs of three, and 0.68 of the runs of five.
Of 100,000 texts of 580 characters, the signatures take 6 s where a MinHash is updated once a text with hashes that are
kept by word (62 s where run by run, by SHA-1), and the bands 0.2 s and 50 MB where they are sorted (9 s and 680 MB in
datasketch's own index).
"""

from __future__ import annotations

import re
from collections import defaultdict
from zlib import crc32

import numpy as np

from runtime.extras import needs_package

THRESHOLD = 0.8
PERMUTATIONS = 128  # the share is estimated with a standard deviation of 0.035
BANDS, ROWS = 21, 6  # two texts at the threshold have a band in common with probability 0.998, at 0.5 with 0.28
COMPARED = 50  # earlier texts of a band, at most, so that a band that thousands have does not take hours
CHUNK = 4096
# Scripts without blanks between words, of which each letter is taken for one.
UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")
TOKEN = re.compile(rf"{UNSPACED.pattern}|\w+|[^\w\s]")


class Hashes(dict):
    """The hash of each word, kept for the next time: most words come again."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 10**6:
            self.clear()
        self[word] = found = crc32(word.encode("utf-8", "replace"))
        return found


HASHES = Hashes()


def runs_of(text: str) -> np.ndarray:
    """A hash of each run of three words, or of a shorter text's words, shape (runs,)."""
    lower = text.lower()
    words = TOKEN.findall(lower) if not lower.isascii() and UNSPACED.search(lower) else lower.split()
    hashes = np.fromiter(map(HASHES.__getitem__, words), np.uint32, len(words))
    if len(words) < 3:
        return hashes
    return hashes[:-2] * np.uint32(0x9E3779B1) + hashes[1:-1] * np.uint32(0x85EBCA77) + hashes[2:]


class Signatures:
    """The signatures of texts, in the order in which they are added: 512 bytes each."""

    def __init__(self) -> None:
        with needs_package("datasketch", "instructions"):
            from datasketch import MinHash
        self.minhash = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        self.chunks: list[np.ndarray] = []
        self.count = 0

    def add(self, text: str) -> None:
        """One text more."""
        if self.count % CHUNK == 0:
            self.chunks.append(np.empty((CHUNK, PERMUTATIONS), np.uint32))
        self.minhash.clear()
        self.minhash.update_batch(runs_of(text).tolist())
        self.chunks[-1][self.count % CHUNK] = self.minhash.hashvalues
        self.count += 1

    def near(self) -> dict[int, tuple[int, float]]:
        """For each text that is near an earlier one that is near none itself: that one, and the share of their runs."""
        firsts: dict[tuple[int, int], list[int]] = defaultdict(list)  # of a band's texts, those that are near none
        found = {}
        for text, bands in _shared_bands(self._all()).items():
            others = sorted({other for band in bands for other in firsts[band]})
            shares = (self._all()[others] == self._all()[text]).mean(axis=1) if others else np.zeros(1)
            if shares.max() >= THRESHOLD:
                found[text] = others[int(shares.argmax())], float(shares.max())
                continue
            for band in bands:
                if len(firsts[band]) < COMPARED:
                    firsts[band].append(text)
        return found

    def _all(self) -> np.ndarray:
        """All signatures, (texts, PERMUTATIONS)."""
        if len(self.chunks) != 1 or len(self.chunks[0]) != self.count:
            whole = np.empty((self.count, PERMUTATIONS), np.uint32)
            for i in range(len(self.chunks)):
                part = whole[i * CHUNK : (i + 1) * CHUNK]
                part[:] = self.chunks[i][: len(part)]
                self.chunks[i] = None
            self.chunks = [whole]
        return self.chunks[0]


def _shared_bands(signatures: np.ndarray) -> dict[int, list[tuple[int, int]]]:
    """For each text that has a band in common with another, in order, those bands, as (band, number of its value)."""
    shared: dict[int, list[tuple[int, int]]] = defaultdict(list)
    weights = np.random.default_rng(0).integers(1, 2**63, ROWS, np.uint64) | np.uint64(1)
    for band in range(BANDS):
        rows = signatures[:, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        values, numbers, counts = np.unique(rows @ weights, return_inverse=True, return_counts=True)
        for text in np.flatnonzero(counts[numbers] > 1).tolist():
            shared[text].append((band, int(numbers[text])))
    return dict(sorted(shared.items()))
