"""A tokenizer.json as the vocabulary of a GGUF file, for the kinds of which llama.cpp knows how they cut a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from data.pretrained_tokenizer import FILE, PretrainedTokenizer
from data.tokenizers import Tokenizer
from jobs.exporting.hugging_face.tokens import tokenizer_files
from runtime.errors import UserError

WITHOUT = "export it with --no-tokenizer, for programs that pass token ids"
# llama.cpp's name for each way to cut a text into pieces, by the regular expressions that do so.
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt-2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """tokens: the text of each id, or None for one that has none. special, added: ids of control tokens, and of others
    that are taken out of a text before it is cut. pre: llama.cpp's name for how a text is cut. puts_bos: whether
    `bos_id` goes in front of a text; lacks_bos: whether it only stands in for one that the tokenizer does not have."""

    pre: str
    tokens: list[str | None]
    special: frozenset[int]
    added: frozenset[int]
    merges: list[str]
    bos_id: int
    eos_id: int
    puts_bos: bool
    lacks_bos: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> Vocabulary:
        """The vocabulary of a model with so many tokens. Raises UserError, with the reason, where llama.cpp has none
        like it."""
        if (end := tokenizer.eos_id) is None:
            raise UserError(
                "its tokenizer has no token that ends a text, and llama.cpp would take an ordinary one for it; "
                + WITHOUT
            )
        about = json.loads(_json_of(tokenizer))
        pre, model, added = _pre(about), about["model"], about.get("added_tokens") or []
        ids = model["vocab"] | {token["content"]: token["id"] for token in added}
        names = {i: name for name, i in ids.items()}
        bos = end if tokenizer.bos_id is None else tokenizer.bos_id
        return cls(
            pre=pre,
            tokens=[names.get(i) for i in range(size)],
            special=frozenset(token["id"] for token in added if token["special"]),
            added=frozenset(token["id"] for token in added if not token["special"]),
            merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
            bos_id=bos,
            eos_id=end,
            lacks_bos=tokenizer.bos_id is None,
            puts_bos=tokenizer.encode("a")[:1] == [bos],
        )

    @property
    def letter(self) -> int:
        """A token that is a plain letter."""
        return next(i for i, token in enumerate(self.tokens) if token and len(token) == 1 and token in ascii_letters)

    def template(self, own: str) -> str:
        """A chat template for llama.cpp, which always has a token that begins a text: none is written where the
        tokenizer has none."""
        return "{% set bos_token = '' %}" + own if self.lacks_bos else own


def _json_of(tokenizer: Tokenizer) -> bytes:
    if isinstance(tokenizer, PretrainedTokenizer):
        return tokenizer.data
    if files := tokenizer_files(tokenizer, 1):
        return bytes(files[FILE])
    raise UserError(f"no tokenizer.json encodes as its tokenizer does; {WITHOUT}")


def _pre(about: dict[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer cuts a text. Raises UserError where it has none."""
    cut = about.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    kinds = [step.get("type") for step in steps]
    if about["model"]["type"] == "BPE" and kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        whole = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and whole:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and whole and steps[0]["individual_digits"]:
            return "smollm"
        cut_by = steps[0]["pattern"].get("Regex") if kinds == ["Split", "ByteLevel"] else None
        if cut_by in PATTERNS and not whole and steps[0]["behavior"] == "Isolated":
            return PATTERNS[cut_by]
    told = f"{about['model']['type']}, {' and '.join(map(str, kinds))}"
    raise UserError(f"its tokenizer ({told}) is none that this knows llama.cpp's name for; {WITHOUT}")
