"""A local web server, and the corpora that several tests read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.corpora import Corpus, load_corpus


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a web server, and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


@pytest.fixture(scope="session")
def shakespeare(data_dir: Path) -> Corpus:
    return load_corpus("shakespeare", data_dir)


@pytest.fixture(scope="session")
def folio(data_dir: Path) -> Corpus:
    return load_corpus("folio", data_dir)


@pytest.fixture(scope="session")
def milton(data_dir: Path) -> Corpus:
    return load_corpus("milton", data_dir)
