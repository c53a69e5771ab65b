"""A tokenizer of ours as the `tokenizer.json` that the tokenizers library reads, where that encodes alike."""

from __future__ import annotations

import json
from typing import Any

from data.pretrained_tokenizer import CONFIG, FILE
from data.tokenizers import END, BPETokenizer, CharTokenizer, Tokenizer
from runtime.extras import needs_package
from runtime.storage.encoding import to_json
from runtime.storage.folders import Files

# Texts that the tokenizer of an export is compared on, where the run's own can write them at all.
SAMPLES = (
    "Enter Hamlet. To be, or not to be:\nthat is the Queſtion!\n\n\tI'll, you'LL; we've 12345 in 1623  (blanks)   \n",
    "Ünïcödé, Ελληνικά, русский, 漢字かな, 🙂👍🏽 and\u00a0more\r\n", "the cat and the dog sat on the mat\n", "a", " ",
)  # fmt: skip


def samples_for(tokenizer: Tokenizer) -> list[str]:
    """The samples that a tokenizer can write and read back."""
    return [t for t in SAMPLES if not tokenizer.unknown(t) and tokenizer.decode(tokenizer.encode_inside(t)) == t]


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> Files:
    """tokenizer.json and tokenizer_config.json; nothing where these would not encode alike. longest: the context."""
    made = _characters(tokenizer) if isinstance(tokenizer, CharTokenizer) else _byte_pairs(tokenizer)
    if any(made.encode(text).ids != tokenizer.encode(text) for text in samples_for(tokenizer)):
        return {}
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    about["clean_up_tokenization_spaces"] = False
    if tokenizer.eos_id is not None:
        about["eos_token"] = END
    return {FILE: json.dumps(json.loads(made.to_str()), ensure_ascii=False).encode(), CONFIG: to_json(about)}


def _characters(tokenizer: CharTokenizer) -> Any:
    """A word for each character; as here, one that is not known is an error."""
    with needs_package("tokenizers", "pretrained"):
        import tokenizers
    vocabulary = {char: i for i, char in enumerate(tokenizer.vocabulary)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    every = tokenizers.Regex(r"[\s\S]")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(every, "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return made


def _byte_pairs(tokenizer: BPETokenizer) -> Any:
    """Byte-pair encoding with every pair that makes a token, in the order of the tokens."""
    with needs_package("tokenizers", "pretrained"):
        import tokenizers
    letters, tokens = _letters(), tokenizer.tokens[:-1]
    known = set(tokens)
    names = {token: "".join(letters[byte] for byte in token) for token in tokens}
    splits = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    merges = [(names[left], names[right]) for left, right in splits if {left, right} <= known]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({names[token]: i for i, token in enumerate(tokens)}, merges))
    pieces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokenizer.split), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([pieces, byte_level])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(END, special=True, normalized=False)])
    return made


def _letters() -> dict[int, str]:
    """The printable letter that stands for each byte in a vocabulary of bytes, as GPT-2's has it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
