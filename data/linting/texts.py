"""What can be wrong with a text that a model is to say, and what of it can be mended: sentences, boilerplate, URLs,
white space and broken characters. Code between backticks is left alone."""

from __future__ import annotations

import re

CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
# A sentence ends at a line's end, and at a stop with blanks after it, but an abbreviation's or a list's number's.
# The class at the beginning is what the engine looks for, quickly; what follows asks which of its signs it found.
END = re.compile(
    r"[.!?。！？\n](?:(?<=[.!?])(?<![.!?][.!?])[.!?]*+(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\b[DM]r\.)(?<!\bMrs\.)"
    r"(?<!\b\d\.)(?<!\b\d\d\.)[\"'”’)\]]*+\s++|(?<=[。！？])[”’」』]?\s*+|(?<=\n)\s*+)"
)  # nothing is looked at twice, as a text may be a million stops

# --- boilerplate ----------------------------------------------------------------------------------------------------

MODEL = r"(?:(?:large )?language model|(?:ai|artificial intelligence)(?: language)? (?:model|assistant|chatbot|system))"
# Anywhere in an answer: what a model says of itself, refusals and disclaimers.
BOILERPLATE = re.compile(
    rf"\bas an? (?:{MODEL}|ai(?:,| i\b))"
    rf"|\bi(?:['’]m| am) (?:just |only |simply )?an? (?:{MODEL}|ai(?:[,.;!]| and\b| so\b|$))"
    r"|\bi (?:do not|don['’]t|can(?:not|['’]t)) have (?:any )?personal (?:opinion|feeling|emotion|belief|experience)"
    r"|\bmy (?:knowledge|training)(?: data)? (?:cut-?off|only (?:goes|extends))"
    r"|\bas of my (?:last|latest|most recent|knowledge|training) ?(?:knowledge |training )?(?:update|cut-?off|data)?\b"
    r"|\bi(?:['’]m| am) (?:sorry|afraid),? (?:but )?i(?: am|['’]m)? ?(?:can(?:['’]t|not)|not able to|unable to)"
    r" (?:assist|help|fulfil|comply|do that|answer|complete|provide)"
    r"|\bnot (?:be )?(?:a substitute for|intended (?:as|to be)|considered|taken as|construed as|constitute|meant as)"
    r" (?:\w+[, ]+){0,5}advice\b"
    r"|\bfor (?:general )?(?:informational|educational|entertainment) purposes only\b"
    r"|\bi(?:['’]m| am) not an? (?:doctor|lawyer|attorney|medical professional|financial advis[oe]r)\b"
    r"|^\W*disclaimer:",
    re.IGNORECASE,
)
# How an answer begins: what stands before the answer proper.
OPENING = re.compile(
    r"\s*(?:(?:certainly|sure(?: thing)?|of course|absolutely)"
    r"(?:[!,.]+ (?:here(?:['’]s| is| are)|below|let me)\b[^:.!?\n]*(?::|\n|[.!?]\s)|!+(?:\s|$))"
    r"|(?:that['’]s a )?great question[!.,]|i(?:['’]d| would) be happy to (?:help|assist)\b[^:.!?\n]*[:.!?\n])\s*",
    re.IGNORECASE,
)
CLOSING = re.compile(
    r"^(?!\d+[.)]|[-*•])(?:i? ?hope (?:this|that|it) helps\b|.*\blet me know if (?:you|there)\b"
    r"|.*\bis there anything else (?:i can|you)\b"
    r"|.*\b(?:feel free|(?:don['’]t|do not) hesitate) to (?:ask|reach out(?! to)|let me know)\b)",
    re.IGNORECASE,
)
HOWEVER = re.compile(r"(?:however|but|nevertheless|that said),? ", re.IGNORECASE)
# What BOILERPLATE and CLOSING need, in lower case: to look for these takes a fraction of the time.
STEMS = (
    "an ai", "i'm an", "i’m an", "i am an", "language model", "have personal", "have any personal", "my kn", "my tr",
    "as of my", "sorry", "afraid", "advice", "purposes only", "not a", "disclaimer", "a ai", "artificial intelligence",
)  # fmt: skip
LAST_STEMS, LAST = ("hope", "let me know", "anything else", "feel free", "hesitate"), 200  # characters at the end


def pieces(text: str) -> list[str]:
    """The sentences of a text, each with the blanks after it."""
    ends = [match.end() for match in END.finditer(text)]
    return [text[i:j] for i, j in zip([0, *ends], [*ends, len(text)], strict=True) if i < j]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without its code."""
    return list(filter(None, map(str.strip, pieces(CODE.sub(" ", text) if "`" in text else text))))


def _has_any(text: str, stems: list[str]) -> bool:
    lower = text.lower()
    return any(stem in lower for stem in stems)


def split_boilerplate(text: str) -> tuple[str, list[str]]:
    """An answer without its boilerplate, of which nothing may be left, and the sentences that are boilerplate."""
    lower, opening = text.lower(), OPENING.match(text)
    stems, last = [stem for stem in STEMS if stem in lower], lower[-LAST:]
    if not (opening or stems or any(stem in last for stem in LAST_STEMS)):
        return text, []
    parts = pieces(text[opening.end() :] if opening else text)
    found = {i for i, part in enumerate(parts) if _has_any(part, stems) and BOILERPLATE.search(part.strip())}
    if len(parts) + bool(opening) > 1 and CLOSING.search(parts[-1].strip()):  # which in a letter is not the last one
        found.add(len(parts) - 1)
    told = ([opening[0].strip()] if opening else []) + [parts[i].strip() for i in sorted(found)]
    if not told:
        return text, []
    kept = "".join(part for i, part in enumerate(parts) if i not in found).strip()
    if 0 in found and (however := HOWEVER.match(kept)):  # which answered what is gone
        kept = kept[however.end() :]
        kept = kept[:1].upper() + kept[1:]
    return kept, told


# --- URLs -----------------------------------------------------------------------------------------------------------

# Up to what no URL has in it, and without the sign that ends the sentence.
AT_URL = (
    r"(?:\b(?:https?|ftp)://|\bwww\.(?=\w))[^\s<>\"'`|\\\u3000-\u303f\uff00-\uffef]{0,1000}"
    r"[^\s<>\"'`|\\\u3000-\u303f\uff00-\uffef.,;:!?)\]}*_]"
)
URL = re.compile(AT_URL, re.IGNORECASE)
LINK = re.compile(rf"!?\[([^\[\]\n]{{0,300}})\]\(\s*({AT_URL}[^)\s]*)\s*\)", re.IGNORECASE)
ASIDE = re.compile(rf"(?:(?<![ \t])[ \t]++)?(?:\(\s*{AT_URL}\s*\)|\[\s*{AT_URL}\s*\]|<{AT_URL}>)", re.IGNORECASE)
# A sentence that only points elsewhere: a URL by itself, or after a few words that name it.
POINTER = re.compile(
    rf"^\W*(?:(?:please )?(?:see|visit|check out|read|learn more|more (?:info|information|details)|sources?|references?"
    rf"|links?|website|url)\b[^.!?\n]{{0,60}}?|for (?:more|further|additional)\b[^.!?\n]{{0,80}}?)?{AT_URL}\W*$",
    re.IGNORECASE,
)


def has_url(text: str) -> bool:
    """Whether it may have one: a quick look."""
    return "://" in text or "www." in text or "WWW." in text


def urls(text: str) -> list[str]:
    """The URLs in a text, without those in its code."""
    return URL.findall(CODE.sub(" ", text) if "`" in text else text) if has_url(text) else []


def without_urls(text: str) -> tuple[str, int]:
    """A text without the URLs that can go, and how many they were: of links, those in brackets, and sentences that only
    point to one. One that is part of what a sentence says stays, and so does a text that is nothing else."""
    if not (before := len(urls(text))) or "`" in text:
        return text, 0
    kept = [part for part in pieces(text) if not (has_url(part) and POINTER.search(LINK.sub(r"\2", part).strip()))]
    found = ASIDE.sub("", LINK.sub(r"\1", "".join(kept))).strip()
    return (found, before - len(urls(found))) if found else (text, 0)


# --- white space ----------------------------------------------------------------------------------------------------

SPACES = (
    (re.compile(r"\r\n?|[\x85\u2028\u2029]"), "\n"),
    (re.compile(r"[\ufeff\u200b]"), ""),  # which nobody sees
    (re.compile(r"(?<![ \t\xa0])[ \t\xa0]++$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def tidy(text: str, ends: str = "both") -> str:
    """A text with one kind of line end, no blanks before it, at most one empty line in a row, and nothing unseen.

    ends: which ends of it lose their white space: both, right or none.
    """
    kept = len(text.rstrip()) if ends == "none" else len(text)
    found, tail = text[:kept], text[kept:]
    for pattern, replacement in SPACES:
        found = pattern.sub(replacement, found)
    return {"both": found.strip(), "right": found.rstrip(), "none": found + tail}[ends]


# --- broken characters ----------------------------------------------------------------------------------------------

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
BROKEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ufffe\uffff\ud800-\udfff]"
    r"|â€[™œ\x9d˜¦“”–—]|Ã[\xa0-\xbf]|Â[\xa0-\xbf]|ðŸ[\x80-\xbf˜’“”Œ™š]"  # UTF-8 that was read as Latin-1 or cp1252
)


def broken(text: str) -> str | None:
    """The first character that is none, or sequence that UTF-8 leaves where it is read as another encoding."""
    match = (CONTROLS if text.isascii() else BROKEN).search(text)
    return match[0] if match else None
