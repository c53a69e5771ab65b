"""Play with a base and its adapters in a browser: write a prompt, move an adapter's slider, and see the text change.

python playground.py                                      the newest run's base, and all adapters trained on it
python playground.py --run base-shakespeare --adapter lora-folio-r8 --adapter lora-milton-r8
python playground.py --port 8080 --no-open                with no browser opened

It is serve.py with a page. Nothing comes from elsewhere, and nothing is sent elsewhere.
"""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.serving.running import LIMITS, WHERE, ServerSettings, serve
from runtime.console import say
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line, has_display
from runtime.settings.fields import setting


@dataclass(frozen=True, kw_only=True)
class Options(ServerSettings):
    """The flags of playground.py."""

    open: bool = setting(True, "Open the page in a browser, where there is a display", **WHERE)
    at_once: int = setting(4, "Texts generated at once; with more, each is slower", low=1, high=1024, **LIMITS)


def main() -> None:
    """Run the command."""
    options = from_command_line(Options, __doc__).settings

    def show(url: str) -> None:
        say(f"{url}/ is the page")
        if options.open and has_display():
            webbrowser.open(url)

    serve(options, show)


if __name__ == "__main__":
    run_command(main)
