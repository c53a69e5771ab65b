"""A pretrained model's own tokenizer: `tokenizer.json`, read by the tokenizers library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.tokenizers import StreamDecoder, Tokenizer
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.storage.content import Content
from runtime.storage.encoding import read_json
from runtime.storage.folders import CorruptedError

FILE = "tokenizer.json"
# What else says how a model's text is made into tokens and back, which adapters and merged models carry along.
CONFIG, GENERATION, TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
OTHERS = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")


class PretrainedTokenizer(Tokenizer):
    """tokenizer.json as this repository's tokenizers are. Its special tokens come from the file, never from a text."""

    def __init__(self, data: bytes, settings: Mapping[str, Any]) -> None:
        """data: tokenizer.json. settings: what tokenizer_config.json says, and `eos_token_id` of the model.

        Raises CorruptedError where the file is no tokenizer, UserError without the tokenizers library.
        """
        with needs_package("tokenizers", "pretrained"):
            import tokenizers
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises Exception itself
            raise CorruptedError(f"{FILE} is no tokenizer: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        self.kind, self.data, self.settings = "pretrained", data, settings
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id = (self._id(name) for name in ("bos_token", "eos_token"))
        self.stop_ids = _stop_ids(settings.get("eos_token_id"), self.eos_id)
        special = [t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special]
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.template: str | list | None = settings.get("chat_template")  # text, or a list of named ones

    def _id(self, name: str) -> int | None:
        """The id of a special token that tokenizer_config.json names."""
        token = self.special_text(name)
        return None if token is None else self.tokenizer.token_to_id(token)

    def special_text(self, name: str) -> str | None:
        token = self.settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, with a BOS in front where the file has one, shape (tokens,)."""
        return np.array(self._encode(text, add_special_tokens=True), self.dtype)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, which arguments on a command line can have
        (found,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return found.ids

    def encode_inside(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)

    def special_in(self, text: str) -> str | None:
        return found[0] if (found := self.special.search(text)) else None

    def encode_rendered(self, text: str) -> list[int]:
        self.tokenizer.encode_special_tokens = False
        try:
            return self._encode(text, add_special_tokens=False)
        finally:
            self.tokenizer.encode_special_tokens = True

    def unknown(self, text: str) -> dict[str, int]:
        return {}

    def dumps(self) -> bytes:
        return self.data

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of some ids, without special tokens; ids beyond the vocabulary, which a model may have, are none."""
        return self.tokenizer.decode([i for i in map(int, ids) if i < self.vocab_size], skip_special_tokens=True)

    def stream(self) -> PretrainedStream:
        return PretrainedStream(self)


class PretrainedStream(StreamDecoder):
    """Decodes ids one at a time, by the library's own stream."""

    def __init__(self, tokenizer: PretrainedTokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.told, self.ids = tokenizer, "", []
        self.decoder = DecodeStream(skip_special_tokens=True)

    def feed(self, token: int) -> str:
        if token >= self.tokenizer.vocab_size:
            return ""
        self.ids.append(token)
        text = self.decoder.step(self.tokenizer.tokenizer, token) or ""
        self.told += text
        return text

    def flush(self) -> str:
        """What the last tokens still had in them: the beginning of a character that was never completed."""
        whole = self.tokenizer.decode(self.ids)
        return whole.removeprefix(self.told) if whole.startswith(self.told) else ""


def _stop_ids(model_eos: Any, eos: int | None) -> tuple[int, ...]:
    """The tokens that end a text: what the model's config names, one or several, and the tokenizer's own."""
    named = model_eos if isinstance(model_eos, list) else [model_eos]
    return tuple(dict.fromkeys(i for i in (*named, eos) if isinstance(i, int)))


def sidecar(files: Mapping[str, bytes | Content]) -> dict[str, bytes | Content]:
    """Those of a model's files that tell how text becomes tokens and back."""
    return {name: files[name] for name in (FILE, CONFIG, TEMPLATE, *OTHERS) if name in files}


def pretrained_tokenizer(files: Mapping[str, bytes | Content], where: str) -> PretrainedTokenizer:
    """The tokenizer of a model's folder. Raises UserError where there is none, or none that can be read."""
    if FILE not in files:
        raise UserError(
            f"{where} has no {FILE}; save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    settings = _settings(files, "special_tokens_map.json", where) | _settings(files, CONFIG, where)
    for name in ("config.json", GENERATION):
        eos = _settings(files, name, where).get("eos_token_id")
        settings |= {} if eos is None else {"eos_token_id": eos}
    if TEMPLATE in files:
        settings["chat_template"] = bytes(files[TEMPLATE]).decode(errors="replace")
    try:
        return PretrainedTokenizer(bytes(files[FILE]), settings)
    except CorruptedError as error:
        raise CorruptedError(f"{where}/{error}") from None


def _settings(files: Mapping[str, bytes | Content], name: str, where: str) -> dict[str, Any]:
    return read_json(files[name], f"{where}/{name}") if name in files else {}
