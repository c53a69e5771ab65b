"""Serve a base and its adapters over HTTP, in OpenAI's protocol: each is a model with a name of its own.

python serve.py                                           the newest run's base, and all adapters trained on it
python serve.py --run base-shakespeare --adapter lora-folio-r16 --port 8080
curl localhost:8000/v1/completions -d '{"model": "lora-folio-r16", "prompt": "O Romeo"}'

Requests with different adapters are answered in one batch. A text does not depend on what else is asked for: the same
request with the same seed gets the same text. SIGTERM and Ctrl-C finish what has begun.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.serving.engine import Engine
from jobs.serving.offers import Offers
from runtime.console import say
from runtime.device import pick_machine
from runtime.errors import UsageError
from runtime.extras import needs_package
from runtime.processes.command import run_command
from runtime.settings.config import CommonSettings, from_command_line, serve_api_key
from runtime.settings.fields import setting

WHAT, WHERE, LIMITS = ({"group": title, "env": False} for title in ("What to serve", "Where", "Limits"))


@dataclass(frozen=True, kw_only=True)
class Options(CommonSettings):
    """The flags of serve.py."""

    run: str = setting("", "A run whose base is served; empty takes the newest", path=True, **WHAT)
    adapter: tuple[str, ...] = setting(
        (), "A LoRA run to offer; may be repeated; without it, all that were trained on the base", **WHAT
    )
    host: str = setting(
        "127.0.0.1", "The address to listen on; others than this machine's own need SERVE_API_KEY",
        pattern=r"[0-9A-Za-z.:_-]{1,253}", allowed="a host's name or address", **WHERE,
    )  # fmt: skip
    port: int = setting(8000, "The port; 0 takes a free one", low=0, high=65535, **WHERE)
    at_once: int = setting(16, "Texts that are made at a time", low=1, high=1024, **LIMITS)
    waiting: int = setting(256, "Texts that may wait; with more, requests are refused", low=0, high=100_000, **LIMITS)
    max_tokens: int = setting(1024, "Tokens that a text may have", low=1, high=10**6, **LIMITS)
    max_body: int = setting(2**20, "Bytes that a request may have", low=1, high=2**30, **LIMITS)
    max_seconds: float = setting(300.0, "Seconds that a request may take", low=0.1, high=10**6, **LIMITS)


def main() -> None:
    """Run the command."""
    options, key = from_command_line(Options, __doc__).settings, serve_api_key()
    with needs_package("uvicorn", "serve"), needs_package("starlette", "serve"):
        from jobs.serving.app import Limits, Server
        from jobs.serving.listening import LOOPBACK, hosts_of, listen, run_until_told, stop
    if options.host not in LOOPBACK and not key:
        raise UsageError(
            f"--host {options.host} lets others in: set SERVE_API_KEY, in the environment or in .env, to a key that "
            "clients must send"
        )
    machine, listening = pick_machine(options.device, options.dtype), listen(options.host, options.port)
    offers = Offers.open(Path(options.checkpoints_dir), options.run, options.adapter)
    model = offers.base.model.requires_grad_(False).to(machine.device)
    limits = Limits(options.max_tokens, options.max_body, options.max_seconds)
    with Engine(model, list(offers.attached.values()), machine, options.at_once, options.waiting, stop) as engine:
        app = Server(offers, engine, limits, key, time.time()).app(hosts_of(options.host))
        host, port = listening.getsockname()[:2]
        say(f"Serving {', '.join(offers.models)} on {machine}")
        say(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1 is the base URL for clients; Ctrl-C ends it")
        run_until_told(app, listening, options.max_seconds)
    if engine.failure:
        raise engine.failure
    say("Stopped; what had begun was finished")


if __name__ == "__main__":
    run_command(main)
