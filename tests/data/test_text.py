"""Batches: functions of seed and step, the next token as target, each validation token once."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.corpora import Corpus
from data.text import TextData, tokens_of, validation_windows
from data.tokenizers import build_tokenizer
from runtime.errors import UserError
from runtime.training.batch import Batch

TOKENS = np.arange(5000, dtype=np.uint16)


def windows_of(tokens: np.ndarray, block_size: int, rows: int, seed: int) -> TextData:
    """These tokens as both splits of a text."""
    return TextData(Corpus("text", "", ""), tokens, tokens, block_size, rows, rows, seed)


def pair(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets."""
    return batch.tokens, batch.targets


def test_tokens_are_cached_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = "To be, or not to be\n" * 50
    tokenizer = build_tokenizer("char", text, 0)
    first = tokens_of(text, tokenizer, tmp_path)
    assert first.tolist() == tokenizer.encode(text)
    (path,) = tmp_path.glob("tokens/*/tokens.bin")
    again = tokens_of(text, tokenizer, tmp_path)
    assert (again.tolist(), again.dtype) == (first.tolist(), np.uint16)
    assert capsys.readouterr().err == ""
    data = path.read_bytes()
    for damage in (data[:-10], data[:-10] + b"\0" * 10, b""):
        path.write_bytes(damage)
        assert tokens_of(text, tokenizer, tmp_path).tolist() == first.tolist()
        assert "making it again" in capsys.readouterr().err
        assert path.read_bytes() == data


def test_tokens_of_other_texts_and_tokenizers_are_kept_apart(tmp_path: Path) -> None:
    text = "aß" * 200
    for kind in ("char", "bpe"):
        tokenizer = build_tokenizer(kind, text, 260)
        for part in (text, text[:100]):
            assert tokenizer.decode(tokens_of(part, tokenizer, tmp_path)) == part
    assert len(list(tmp_path.glob("tokens/*"))) == 4


def test_unknown_characters_leave_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer has no"):
        tokens_of("ß", build_tokenizer("char", "a", 0), tmp_path)
    assert not list(tmp_path.rglob("*.bin"))


def test_batches_are_functions_of_seed_and_step() -> None:
    batches = windows_of(TOKENS, 16, 8, seed=1337)
    expected = [batches.batch(step) for step in range(5)]
    for step in (4, 0, 3, 3, 1):
        again = windows_of(TOKENS, 16, 8, seed=1337).batch(step)
        assert torch.equal(again.tokens, expected[step].tokens)
        assert torch.equal(again.targets, expected[step].targets)
    assert not torch.equal(expected[0].tokens, expected[1].tokens)
    assert not torch.equal(windows_of(TOKENS, 16, 8, seed=1338).batch(0).tokens, expected[0].tokens)


def test_batches_do_not_touch_the_global_generators() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    windows_of(TOKENS, 16, 8, seed=0).batch(0)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_batches_stay_the_same_across_versions() -> None:
    x, _ = pair(windows_of(TOKENS, 16, 4, seed=1337).batch(7))
    assert x[:, 0].tolist() == [2710, 2090, 1923, 1842]


def test_target_is_the_next_token() -> None:
    x, y = pair(windows_of(TOKENS, 16, 8, seed=1).batch(3))
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (8, 16)
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(16))


def test_neighbouring_steps_share_no_numbers() -> None:
    batches = windows_of(np.arange(2**20, dtype=np.uint32), 1, 32, seed=5)
    starts = torch.cat([batches.batch(step).tokens.flatten() for step in range(100)])
    assert len(starts.unique()) > 0.99 * len(starts)  # chance alone repeats about five


@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**9))
def test_any_seed_and_step(seed: int, step: int) -> None:
    x, y = pair(windows_of(TOKENS, 16, 4, seed).batch(step))
    assert torch.equal(y, x + 1)


def test_windows_reach_both_ends() -> None:
    batches = windows_of(TOKENS[:20], 16, 64, seed=0)
    x, y = pair(batches.batch(0))
    assert x.min() == 0
    assert y.max() == 19


def test_text_of_exactly_one_window() -> None:
    x, y = pair(windows_of(TOKENS[:17], 16, 2, seed=0).batch(9))
    assert x.tolist() == [list(range(16))] * 2
    (window,) = validation_windows(TOKENS[:17], 16, 2, None)
    assert window.targets.tolist() == [list(range(1, 17))]


@pytest.mark.parametrize(("train", "held_out"), [(0, 0), (100, 0), (100, 1), (100, 2), (100, 16), (16, 100)])
def test_a_text_shorter_than_a_window_is_told_a_size_that_works(train: int, held_out: int) -> None:
    splits = TOKENS[:train], TOKENS[:held_out]
    with pytest.raises(UserError) as error:
        TextData(Corpus("letters", "", ""), *splits, 16, 2, 2, 0)
    told, part = str(error.value), "training" if train < held_out or not train else "held-out"
    shorter = min(train, held_out)
    assert told.startswith(f"the {part} part of letters has {shorter} tokens, and BLOCK_SIZE=16 needs 17; ")
    assert ("--block-size" in told) == (shorter > 1)
    if found := re.search(r"--block-size (\d+)", told):
        data = TextData(Corpus("letters", "", ""), *splits, int(found[1]), 2, 2, 0)
        assert data.batch(0).tokens.shape == (2, shorter - 1) and data.validation(None)


def test_a_batch_takes_well_under_a_millisecond() -> None:
    batches = windows_of(np.zeros(5_000_000, dtype=np.uint16), 128, 32, seed=0)
    times = []
    for step in range(50):
        start = time.perf_counter()
        batches.batch(step)
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 1e-3


@given(length=st.integers(11, 400), block=st.integers(1, 10), batch=st.integers(1, 7))
def test_validation_predicts_each_token_once(length: int, block: int, batch: int) -> None:
    windows = validation_windows(TOKENS[:length], block, batch, None)
    targets = torch.cat([window.targets.flatten() for window in windows])
    assert targets.tolist() == list(range(1, (length - 1) // block * block + 1))
    assert all(torch.equal(window.targets, window.tokens + 1) for window in windows)
    assert all(len(window.tokens) == batch for window in windows[:-1])
    assert 1 <= len(windows[-1].tokens) <= batch


def test_validation_with_a_limit_is_spread_over_the_text() -> None:
    windows = validation_windows(TOKENS, 10, 4, limit=5)
    assert [window.tokens.shape for window in windows] == [(4, 10)] * 5
    starts = torch.cat([window.tokens[:, 0] for window in windows])
    gaps = starts.diff()
    assert starts[0] == 0
    assert starts[-1] > 4700
    assert gaps.max() - gaps.min() <= 10
    assert gaps.min() >= 10


def test_validation_with_a_limit_beyond_the_text_is_all_of_it() -> None:
    every = validation_windows(TOKENS[:300], 10, 4, None)
    limited = validation_windows(TOKENS[:300], 10, 4, limit=1000)
    for one, two in zip(every, limited, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair(one), pair(two), strict=True))
