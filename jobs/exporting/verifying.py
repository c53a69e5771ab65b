"""An export has its name only after those who read it have computed what the run computes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from runtime.errors import UserError
from runtime.storage import folders


@dataclass(frozen=True)
class Difference:
    """How far a reader's logits are off, as a share of the largest, and how far they may be."""

    reader: str
    found: float
    limit: float

    @classmethod
    def between(cls, reader: str, found: Tensor, expected: Tensor, limit: float, fix: str = "") -> Difference:
        """The largest difference. Raises UserError, with what helps, where it is more than the limit, or no number."""
        off = ((found - expected).abs().max() / expected.abs().max()).item()
        if not off <= limit:
            told = f"the logits of {reader} differ by {off:.1e} of the largest, more than {limit:g}"
            raise UserError("; ".join(filter(None, (told, "nothing was saved", fix))))
        return cls(reader, off, limit)

    def __str__(self) -> str:
        return f"the logits of {self.reader} differ by {self.found:.1e} of the largest (up to {self.limit:g} passes)"


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A place for a file or a folder, which gets its name when all went well, and is removed when anything failed.

    Raises UsageError where there is something already, UserError where the disk refuses.
    """
    folders.check_free(out)
    draft = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    with folders.plain_errors(out, "save"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            folders.check_free(out)
            folders.publish_folder(draft, out)
        finally:
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            draft.unlink(missing_ok=True)
