"""What all tests share: where the corpora are cached."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

# Models here are so small that a second thread only waits for the first, and for everybody else on the machine.
os.environ["OMP_NUM_THREADS"] = "1"

# Whose caches are written is not what a test may leave to the machine.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all that tests need without looking for garbage, which is a third of the time, and never look there."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Leave no cache behind."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The cache of real corpora, fetched once by the first test that needs them."""
    folder = Path(os.environ.get("DATA_DIR", ROOT / ".cache" / "data"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
