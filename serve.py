"""Serve a base and its adapters over HTTP, in OpenAI's protocol: each is a model with a name of its own.

python serve.py                                           the newest run's base, and all adapters trained on it
python serve.py --run base-shakespeare --adapter lora-folio-r8 --port 8080
curl localhost:8000/v1/completions -d '{"model": "lora-folio-r8", "prompt": "O Romeo"}'

Requests with different adapters are answered in one batch. A text does not depend on what else is asked for: the same
request with the same seed gets the same text. SIGTERM and Ctrl-C finish what has begun. playground.py is the same with
a page to play on.
"""

from __future__ import annotations

from dataclasses import dataclass

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.serving.running import ServerSettings, serve
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line


@dataclass(frozen=True, kw_only=True)
class Options(ServerSettings):
    """The flags of serve.py."""


def main() -> None:
    """Run the command."""
    serve(from_command_line(Options, __doc__).settings)


if __name__ == "__main__":
    run_command(main)
