"""What a model has to beat on `folio-pairs`: copying the modern line, and a dictionary learned from the training pairs;
and what it can hardly beat, a dictionary learned from the held-out pairs themselves.

python -m benchmarks.folio_baselines

In percent, over all pairs of the held-out plays; in brackets the least and most of the plays. A word is right where it
is spelled as in the First Folio (data/instructions/spelling.py says how words are counted). Copying has no line right,
as there is no pair of lines that are spelled alike. The last dictionary says how much the words alone settle:
the printers spelled one word in several ways, and only what stands around it could tell which.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.contest import close, tell
from data.instructions.folio_pairs import load_folio_pairs
from data.instructions.records import Record, told
from data.instructions.spelling import WORD, SpellingScore, score, words_in
from runtime.processes.command import run_command


def modern_line(record: Record) -> str:
    """The line that a record asks to rewrite."""
    return record.messages[0]["input"]


def learn_dictionary(records: Iterable[Record]) -> dict[str, str]:
    """Each modern word, as it is written -> how the Folio spells it most often in the records."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for modern, folio in zip(words_in(modern_line(record)), words_in(record.answer), strict=True):
            spellings[modern][folio] += 1
    return {modern: counted.most_common(1)[0][0] for modern, counted in spellings.items()}


def respell(line: str, dictionary: dict[str, str]) -> str:
    """A line with each word as the dictionary has it; words that it does not have, and all signs, stay."""
    return WORD.sub(lambda word: dictionary.get(word[0], word[0]), line)


def score_plays(answers: Sequence[str], records: Sequence[Record]) -> tuple[SpellingScore, list[SpellingScore]]:
    """The score over all records, and over those of each play."""
    by_play: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for answer, record in zip(answers, records, strict=True):
        by_play[record.where].append((answer, record.answer))
    whole = score(answers, [record.answer for record in records])
    return whole, [score(*zip(*lines, strict=True)) for lines in by_play.values()]


def measure(train: Sequence[Record], test: Sequence[Record]) -> list[dict]:
    """The rows: words that copying has right, and words and lines that each dictionary has."""
    lines = [modern_line(record) for record in test]
    copied = score_plays(lines, test)
    rows = [_row("copying: percent of words right", [each.words for each in (copied[0], *copied[1])])]
    for what, records in (("a dictionary", train), ("a dictionary of the held-out pairs themselves", test)):
        dictionary = learn_dictionary(records)
        respelled = score_plays([respell(line, dictionary) for line in lines], test)
        rows += [
            _row(f"{what}: percent of words right", [each.words for each in (respelled[0], *respelled[1])]),
            _row(f"{what}: percent of lines right", [each.lines for each in (respelled[0], *respelled[1])]),
        ]
    return rows


def _row(what: str, shares: list[float]) -> dict:
    """A row of the share over all, which comes first, and the least and most of the plays' shares."""
    whole, *plays = (100 * share for share in shares)
    return {"what": what, "median": whole, "min": min(plays), "max": max(plays)}


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data-dir", type=Path, default=Path("data") / "cache")
    flags.add_argument("--record", action="store_true", help="keep the rows in benchmarks/results")
    options = flags.parse_args()
    pairs = load_folio_pairs(options.data_dir)
    plays = ", ".join(f"{play} {count:,}" for play, count in sorted(Counter(r.where for r in pairs.test).items()))
    print(f"{pairs.name}: {told(pairs.train)} to learn from, {len(pairs.test):,} held out ({plays})")
    rows = measure(pairs.train, pairs.test)
    tell(rows)
    close("folio_baselines", rows, options.record)


if __name__ == "__main__":
    run_command(main)
