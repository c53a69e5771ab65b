"""Tokenizers: what goes in comes out, and what cannot go in is said in one line."""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpora import Corpus
from data.tokenizers import ASCII, END, BPETokenizer, CharTokenizer, Tokenizer, build_tokenizer, load_tokenizer
from runtime.errors import UsageError, UserError
from runtime.storage.folders import CorruptedError

SAMPLE = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote; ünïcödé 書\n" * 20
CHAR = build_tokenizer("char", SAMPLE, 0)
BPE = build_tokenizer("bpe", SAMPLE, 300)
GPT2 = BPETokenizer("gpt2", BPE.split, BPE.tokens[:-1])  # GPT-2's own files need a network
ALL = [CHAR, BPE, GPT2]


@given(st.text(st.sampled_from(CHAR.vocabulary)))
def test_char_round_trip(text: str) -> None:
    ids = CHAR.encode_array(text)
    assert ids.shape == (len(text),)
    assert CHAR.decode(ids) == text


@given(st.text())
def test_bpe_round_trip(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.unknown(text) == {}


@given(st.text(st.characters(codec="utf-8") | st.sampled_from(SAMPLE), max_size=60))
@settings(max_examples=50)
def test_any_text_makes_tokenizers_that_encode_it(text: str) -> None:
    for kind in ("char", "bpe"):
        tokenizer = build_tokenizer(kind, text, 300)
        again = load_tokenizer(tokenizer.dumps())
        assert again.decode(tokenizer.encode(text)) == text
        assert again.dumps() == tokenizer.dumps()


def test_char_vocabulary_always_has_ascii() -> None:
    tokenizer = build_tokenizer("char", "zé書é", 0)
    assert tokenizer.vocabulary == ASCII + "é書"
    assert tokenizer.vocab_size == 98
    assert tokenizer.vocabulary.startswith('\n !"#')
    assert build_tokenizer("char", "", 0).vocab_size == 96


def test_char_names_what_it_does_not_know() -> None:
    text = "a" + "ß" * 7 + "\ud800\r\U0001f600" + "ß" + "€‚ƒ„…†‡"
    assert CHAR.unknown(text)["ß"] == 8
    with pytest.raises(UserError) as error:
        CHAR.encode(text)
    message = str(error.value)
    assert message.startswith("the tokenizer has no 'ß' (U+00DF) 8 times, '\\r' (U+000D) 1 times")
    assert "and 3 more" in message
    assert "TOKENIZER=bpe" in message
    assert "\n" not in message
    assert CHAR.unknown(SAMPLE) == {}


def test_char_encodes_a_book_at_once(shakespeare: Corpus) -> None:
    tokenizer = build_tokenizer("char", shakespeare.train, 0)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        ids = tokenizer.encode_array(shakespeare.text)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2
    assert ids.dtype == np.uint16
    assert tokenizer.vocab_size == 96


def test_one_character_tokenizer_covers_all_corpora(shakespeare: Corpus, folio: Corpus, milton: Corpus) -> None:
    tokenizer = build_tokenizer("char", shakespeare.train, 0)
    assert all(tokenizer.unknown(corpus.text) == {} for corpus in (shakespeare, folio, milton))


def test_bpe_on_a_book(folio: Corpus) -> None:
    tokenizer = build_tokenizer("bpe", folio.train, 1024)
    assert tokenizer.vocab_size == 1024
    ids = tokenizer.encode_array(folio.validation)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == folio.validation
    assert len(ids) < 0.45 * len(folio.validation)
    assert build_tokenizer("bpe", folio.train, 1024).sha256 == tokenizer.sha256


def test_surrogates_never_end_in_a_traceback() -> None:
    with pytest.raises(UserError, match="U\\+D800"):
        build_tokenizer("char", "a\ud800", 0).encode("a\ud800")
    assert BPE.decode(BPE.encode("a\ud800b")) == "a\ufffdb"
    assert build_tokenizer("bpe", "a\ud800" * 9, 300).decode([97]) == "a"


def test_end_of_text_is_only_text_when_encoded() -> None:
    ids = BPE.encode(f"a{END}b")
    assert BPE.vocab_size - 1 not in ids
    assert BPE.decode(ids) == f"a{END}b"
    assert BPE.decode([BPE.vocab_size - 1]) == END


def test_short_text_yields_fewer_tokens(capsys: pytest.CaptureFixture) -> None:
    tokenizer = build_tokenizer("bpe", "abc abc abc", 5000)
    assert tokenizer.vocab_size < 270
    assert f"only {tokenizer.vocab_size} tokens" in capsys.readouterr().err
    assert tokenizer.encode_array("abc").max() < tokenizer.vocab_size


@pytest.mark.parametrize("size", [-1, 0, 255, 256])
def test_vocabulary_without_room_for_bytes(size: int) -> None:
    with pytest.raises(UsageError, match=f"VOCAB_SIZE={size}.*257"):
        build_tokenizer("bpe", SAMPLE, size)


def test_smallest_vocabulary_is_bytes() -> None:
    tokenizer = build_tokenizer("bpe", SAMPLE, 257)
    assert len(tokenizer.encode("書")) == 3


def test_unknown_kind() -> None:
    with pytest.raises(UsageError, match="TOKENIZER=words: there are char, bpe, gpt2"):
        build_tokenizer("words", SAMPLE, 300)


def test_run_of_blanks_that_outgrows_the_stack() -> None:
    with pytest.raises(UserError, match="run of many thousand blanks"):
        BPE.encode(" " * 1_000_000)
    with pytest.raises(UserError, match="run of many thousand blanks"):
        build_tokenizer("bpe", " " * 1_000_000, 300)


def test_interrupts_are_not_taken_for_panics(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BPE, "encoding", types.SimpleNamespace(encode_to_numpy=interrupted))
    with pytest.raises(KeyboardInterrupt):
        BPE.encode("text")


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("hash mismatch")])
def test_gpt2_without_its_files(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("tiktoken.get_encoding", fail)
    with pytest.raises(UserError) as raised:
        build_tokenizer("gpt2", "", 0)
    message = str(raised.value)
    assert "TOKENIZER=bpe or TOKENIZER=char" in message
    assert "with a network" in message
    assert "\n" not in message


def test_gpt2_carries_its_tokens_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: BPE.encoding)
    tokenizer = build_tokenizer("gpt2", "", 0)
    monkeypatch.undo()
    again = load_tokenizer(tokenizer.dumps())
    assert (again.kind, again.sha256) == ("gpt2", tokenizer.sha256)
    assert again.encode(SAMPLE) == BPE.encode(SAMPLE)


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.kind)
@given(data=st.data())
def test_stream_says_what_decode_says(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


def test_stream_holds_a_character_until_it_is_whole() -> None:
    ids = build_tokenizer("bpe", "ascii", 257).encode("書!")
    stream = build_tokenizer("bpe", "ascii", 257).stream()
    assert [stream.feed(token) for token in ids] == ["", "", "書", "!"]
    assert stream.feed(ids[0]) == ""
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.kind)
def test_ids_out_of_range(tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="token ids must be within"):
            tokenizer.decode([0, bad])
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([], dtype=np.uint16)) == ""
    assert tokenizer.encode_array("").shape == (0,)


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.kind)
def test_dumps_is_ascii_and_loads(tokenizer: Tokenizer) -> None:
    data = tokenizer.dumps()
    data.decode("ascii")
    again = load_tokenizer(data)
    assert type(again) is type(tokenizer)
    assert (again.kind, again.vocab_size, again.sha256) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.sha256)
    assert again.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_large_vocabularies_get_wide_ids() -> None:
    wide = CharTokenizer("".join(chr(code) for code in range(0x10000, 0x10000 + 65537)))
    assert wide.encode(chr(0x10000 + 65536)) == [65536]
    assert wide.dtype == np.uint32
    assert CharTokenizer(wide.vocabulary[:65536]).dtype == np.uint16


def _changed(change: Callable[[dict], object], tokenizer: Tokenizer = BPE) -> bytes:
    fields = json.loads(tokenizer.dumps())
    change(fields)
    return json.dumps(fields).encode()


DAMAGED = {
    "empty": b"",
    "cut": BPE.dumps()[:1000],
    "no JSON": b"\xff\xfe\x00",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "deep": b"[" * 100_000,
    "no kind": b"{}",
    "other kind": b'{"kind": "words"}',
    "odd kind": b'{"kind": ["char"]}',
    "char without vocabulary": b'{"kind": "char"}',
    "empty vocabulary": b'{"kind": "char", "vocabulary": ""}',
    "vocabulary of numbers": b'{"kind": "char", "vocabulary": [1, 2]}',
    "doubled character": b'{"kind": "char", "vocabulary": "aba"}',
    "surrogate": b'{"kind": "char", "vocabulary": "a\\ud800"}',
    "bpe without tokens": b'{"kind": "bpe", "split": "."}',
    "byte missing": _changed(lambda fields: fields["tokens"].remove("a")),
    "doubled token": _changed(lambda fields: fields["tokens"].append("a")),
    "token beyond bytes": _changed(lambda fields: fields["tokens"].append("書")),
    "token no text": _changed(lambda fields: fields["tokens"].append(7)),
    "tokens no list": _changed(lambda fields: fields.update(tokens=5)),
    "split no regex": _changed(lambda fields: fields.update(split="(")),
    "split no text": _changed(lambda fields: fields.update(split=None)),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_corrupted_files_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptedError, match="the tokenizer file is corrupted") as error:
        load_tokenizer(data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_unknown_characters_beyond_the_table_edge() -> None:
    assert CHAR.unknown(chr(sys.maxunicode)) == {chr(sys.maxunicode): 1}


def test_special_tokens_are_told_and_no_text_becomes_one() -> None:
    char, bpe = build_tokenizer("char", "text", 0), build_tokenizer("bpe", "some text", 260)
    assert (char.bos_id, char.eos_id, char.stop_ids) == (None, None, ())
    assert bpe.bos_id is None and bpe.stop_ids == (bpe.eos_id,) and bpe.decode([bpe.eos_id]) == "<|endoftext|>"
    assert bpe.eos_id not in bpe.encode("<|endoftext|>")
