"""TensorBoard's event files, in the run's folder: https://github.com/tensorflow/tensorboard

They are written without TensorBoard's own thread, whose failures are tracebacks on the terminal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.extras import needs_package

FOLDER = "tensorboard"
EVERY = 5.0  # seconds between writes to the file, at most


class TensorBoard:
    """A file of events for each start of the run. The first event of one says from which step on those of earlier files
    no longer hold; readers leave these out."""

    label = "TensorBoard"

    @staticmethod
    def check() -> None:
        """Raises UserError where TensorBoard is missing."""
        with needs_package("tensorboard", "tracking"):
            import tensorboard.compat.proto  # noqa: F401

    def __init__(self, folder: Path, settings: Mapping[str, str], resumed_at: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = folder / FOLDER
        folder.mkdir(exist_ok=True)
        there = sorted(folder.glob("events.out.tfevents.*"))
        self.newest = resumed_at if there else 0
        # Readers take files by their names.
        self.file = open(folder / f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}", "xb")  # noqa: SIM115
        self.records, self.flushed = RecordWriter(self.file), time.monotonic()
        self._write(0, file_version="brain.Event:2")
        self._write(resumed_at + 1, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(step=step, wall_time=time.time(), **what).SerializeToString())
        if time.monotonic() - self.flushed > EVERY:
            self.flush()

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """All figures of a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=Summary(value=found))

    def text(self, step: int, name: str, text: str) -> None:
        """A text, in Markdown."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        shown_by = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode("utf-8", "replace")])
        tensor.tensor_shape.dim.add(size=1)
        self._write(step, summary=Summary(value=[Summary.Value(tag=name, metadata=shown_by, tensor=tensor)]))

    def flush(self) -> None:
        """Write what is pending to the file."""
        self.file.flush()
        self.flushed = time.monotonic()

    def close(self, failed: bool) -> None:
        """Write the rest."""
        self.file.close()
