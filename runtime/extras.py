"""Packages that only some features need: imported where they are used, and their absence is one line."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from runtime.errors import UserError
from runtime.start import install_line


@contextmanager
def needs_package(package: str, extra: str) -> Iterator[None]:
    """For imports of a package: where it is missing, UserError with the line that installs the extra it belongs to."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        needed = f"this needs the package {package}, which is not installed"
        raise UserError(f"{needed}; get it with: {install_line(f'requirements-{extra}.txt')}") from None


@cache
def bitsandbytes() -> ModuleType:
    """The functions of bitsandbytes, which take seconds to import. Raises UserError where it is not installed."""
    # It tells of a package with other kernels, which nobody who reads that here asked for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with needs_package("bitsandbytes", "memory"):
        return importlib.import_module("bitsandbytes.functional")
