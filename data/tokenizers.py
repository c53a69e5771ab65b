"""Text to token ids and back: single characters, or byte-pair encoding, behind one interface."""

from __future__ import annotations

import codecs
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import rustbpe
import tiktoken

from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.storage.content import sha256
from runtime.storage.folders import CorruptedError

KINDS = ("char", "bpe", "gpt2")
END = "<|endoftext|>"
ASCII = "\n" + "".join(map(chr, range(32, 127)))
PART = 2**20  # characters that are looked up at a time
NO_ID = np.uint32(0xFFFFFFFF)


class Tokenizer:
    """What every tokenizer offers. `kind` is one of KINDS, `tokens` the bytes of ids 0..vocab_size-1.

    bos_id, eos_id: special tokens before and after a text, or None where it has none. stop_ids: tokens that end a text
    which is being generated.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __init__(self, kind: str, tokens: list[bytes]) -> None:
        self.kind = kind
        self.tokens = tokens
        self.vocab_size = len(tokens)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type of integer that holds every id."""
        return np.uint16 if self.vocab_size <= 65536 else np.uint32

    @property
    def sha256(self) -> str:
        """Hex digest of `dumps()`: equal for tokenizers that encode alike."""
        return sha256(self.dumps())

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token, whatever the text contains."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The same, shape (tokens,), of type `dtype`."""
        raise NotImplementedError

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on another: with nothing put in front of it."""
        return self.encode(text)

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text in which special tokens stand by name, as a chat template makes it; nothing is put in front."""
        return self.encode_inside(text)

    def special_text(self, name: str) -> str | None:
        """The text of a special token, such as `bos_token`; None where there is none."""
        return None

    def special_in(self, text: str) -> str | None:
        """The first text of a special token in a text, or None."""
        return None

    def unknown(self, text: str) -> dict[str, int]:
        """Characters of the text that cannot be encoded, and how often each occurs."""
        raise NotImplementedError

    def dumps(self) -> bytes:
        """Everything `load_tokenizer` needs, as JSON in ASCII; the same bytes for the same tokenizer."""
        raise NotImplementedError

    def token_bytes(self, ids: np.ndarray | list[int]) -> bytes:
        """The bytes of some ids, which may begin or end within a character. ValueError for an id out of range."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(f"token ids must be within 0..{self.vocab_size - 1}, not {ids.min()}..{ids.max()}")
        return b"".join(map(self.tokens.__getitem__, ids.tolist()))

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id out of range."""
        return self.token_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids one at a time; a character whose bytes are spread over several tokens comes out whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that is complete now; empty while a character still lacks bytes."""
        return self.decoder.decode(self.tokenizer.token_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: empty, or U+FFFD for a character that was never completed."""
        return self.decoder.decode(b"", final=True)


def _is_surrogate(char: str) -> bool:
    return "\ud800" <= char <= "\udfff"


def listed(unknown: dict[str, int], most: int = 8) -> str:
    """Characters with code point and count, the most frequent first."""
    ranked = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{char!r} (U+{ord(char):04X}) {count} times" for char, count in ranked[:most])
    return shown + (f" and {len(ranked) - most} more" if len(ranked) > most else "")


class CharTokenizer(Tokenizer):
    """One id per character: newline, printable ASCII, then the other characters of a text in code point order."""

    def __init__(self, vocabulary: str) -> None:
        super().__init__("char", [char.encode() for char in vocabulary])
        self.vocabulary = vocabulary
        self._ids = np.full(sys.maxunicode + 1, NO_ID, dtype=np.uint32)  # code point -> id
        self._ids[self._code_points(vocabulary)] = np.arange(self.vocab_size, dtype=np.uint32)

    @classmethod
    def train(cls, text: str) -> CharTokenizer:
        """Collect the characters of a text; ASCII is always there, so that an adapter's text is covered too."""
        others = {char for char in set(text) - set(ASCII) if not _is_surrogate(char)}
        return cls(ASCII + "".join(sorted(others)))

    @staticmethod
    def _code_points(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, shape (characters,). Raises UserError that lists the characters it does not know."""
        tokens = np.empty(len(text), self.dtype)
        for start, codes in self._parts(text):
            ids = self._ids[codes]
            if ids.max() == NO_ID:
                raise UserError(
                    f"the tokenizer has no {listed(self.unknown(text))}; choose a DATASET that the base's tokenizer"
                    " covers, or train a base on this text or with TOKENIZER=bpe"
                )
            tokens[start : start + len(ids)] = ids
        return tokens

    def unknown(self, text: str) -> dict[str, int]:
        found: Counter[str] = Counter()
        for _, codes in self._parts(text):
            found.update(map(chr, codes[self._ids[codes] == NO_ID].tolist()))
        return dict(found)

    def _parts(self, text: str) -> Iterator[tuple[int, np.ndarray]]:
        """Code points with where they begin, a part at a time, as they take several times the text's memory."""
        for start in range(0, len(text), PART):
            yield start, self._code_points(text[start : start + PART])

    def dumps(self) -> bytes:
        return json.dumps({"kind": self.kind, "vocabulary": self.vocabulary}).encode()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The Rust libraries' one known failure, a text whose splitting outgrows the stack, as a line for the user."""
    try:
        yield
    except BaseException as error:  # rustbpe panics, and a panic is no Exception
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        fix = "shorten any run of many thousand blanks, or take TOKENIZER=char"
        raise UserError(f"the text cannot be tokenized ({error}); {fix}") from None


def _well_formed(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which UTF-8 cannot hold; arguments on a command line can have them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class BPETokenizer(Tokenizer):
    """Byte-pair encoding: any text can be encoded. The last id is `<|endoftext|>`, which no text encodes to.

    It is made from the tokens in the order of their merging, and a regular expression, `split`, that first cuts a text
    into the pieces inside which bytes merge. Raises ValueError where these cannot make a tokenizer.
    """

    def __init__(self, kind: str, split: str, tokens: list[bytes]) -> None:
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("its tokens must differ, and contain every single byte")
        super().__init__(kind, [*tokens, END.encode()])
        self.eos_id = self.vocab_size - 1
        self.stop_ids = (self.eos_id,)
        self.split = split
        self.encoding = tiktoken.Encoding(kind, pat_str=split, mergeable_ranks=ranks, special_tokens={END: self.eos_id})

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BPETokenizer:
        """Learn merges from a text, taken whole. A short text yields fewer than `vocab_size` tokens; stderr says so.

        Raises UsageError for a `vocab_size` without room for the 256 bytes and the end of text.
        """
        if vocab_size < 257:
            raise UsageError(f"VOCAB_SIZE={vocab_size}: TOKENIZER=bpe needs at least 257 (256 bytes and {END})")
        trainer = rustbpe.Tokenizer()
        with _plain_errors():
            trainer.train_from_iterator(iter([_well_formed(text)]), vocab_size=vocab_size - 1)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        tokenizer = cls("bpe", trainer.get_pattern(), [bytes(token) for token, _ in ranks])
        if tokenizer.vocab_size < vocab_size:
            found = f"the text yields only {tokenizer.vocab_size:,} tokens; the vocabulary has that size"
            say(f"VOCAB_SIZE={vocab_size}: {found}")
        return tokenizer

    @classmethod
    def gpt2(cls) -> BPETokenizer:
        """GPT-2's tokenizer, from the files that tiktoken downloads once and keeps. Raises UserError without them."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError is a wrong hash
            raise UserError(
                f"TOKENIZER=gpt2 needs files that tiktoken downloads once, and that failed ({type(error).__name__});"
                " run it once with a network, or take TOKENIZER=bpe or TOKENIZER=char"
            ) from error
        ranks = encoding._mergeable_ranks
        return cls("gpt2", encoding._pat_str, sorted(ranks, key=ranks.get))

    def encode_array(self, text: str) -> np.ndarray:
        with _plain_errors():
            return self.encoding.encode_to_numpy(_well_formed(text), disallowed_special=()).astype(self.dtype)

    def encode_rendered(self, text: str) -> list[int]:
        found: list[int] = []
        for i, part in enumerate(text.split(END)):
            found += [*([self.eos_id] if i else []), *self.encode(part)]
        return found

    def special_text(self, name: str) -> str | None:
        return END if name == "eos_token" else None

    def special_in(self, text: str) -> str | None:
        return END if END in text else None

    def unknown(self, text: str) -> dict[str, int]:
        return {}

    def dumps(self) -> bytes:
        tokens = [token.decode("latin-1") for token in self.tokens[:-1]]
        return json.dumps({"kind": self.kind, "split": self.split, "tokens": tokens}).encode()


def build_tokenizer(kind: str, text: str, vocab_size: int) -> Tokenizer:
    """A tokenizer of a kind in KINDS, for a text. Only `bpe` heeds `vocab_size`, which counts `<|endoftext|>` too.

    Raises UsageError for an unknown kind or too small a vocabulary, UserError where GPT-2's files cannot be had.
    """
    if kind == "char":
        return CharTokenizer.train(text)
    if kind == "bpe":
        return BPETokenizer.train(text, vocab_size)
    if kind == "gpt2":
        return BPETokenizer.gpt2()
    raise UsageError(f"TOKENIZER={kind}: there are {', '.join(KINDS)}")


def _char_from(fields: dict) -> CharTokenizer:
    vocabulary = fields["vocabulary"]
    if not isinstance(vocabulary, str) or not vocabulary or len(set(vocabulary)) != len(vocabulary):
        raise ValueError("its vocabulary is no text of different characters")
    if any(map(_is_surrogate, vocabulary)):
        raise ValueError("its vocabulary has surrogates")
    return CharTokenizer(vocabulary)


def _bpe_from(fields: dict) -> BPETokenizer:
    tokens = [token.encode("latin-1") for token in fields["tokens"]]
    return BPETokenizer(fields["kind"], fields["split"], tokens)


def load_tokenizer(data: bytes) -> Tokenizer:
    """The tokenizer that `dumps` wrote. Raises CorruptedError for anything else."""
    try:
        fields = json.loads(data)
        if fields["kind"] not in KINDS:
            raise ValueError(f"there is no kind {fields['kind']!r}")
        return _char_from(fields) if fields["kind"] == "char" else _bpe_from(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptedError(f"the tokenizer file is corrupted: {type(error).__name__}: {error}") from None
