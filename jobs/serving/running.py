"""A server from its flags to its end, with the page of the playground or without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.console import say
from runtime.errors import UsageError
from runtime.extras import needs_package
from runtime.settings.config import CommonSettings, serve_api_key
from runtime.settings.fields import setting
from runtime.start import importing

WHAT, WHERE, LIMITS = ({"group": title, "env": False} for title in ("What to serve", "Where", "Limits"))


@dataclass(frozen=True, kw_only=True)
class ServerSettings(CommonSettings):
    """What is served, where, and within which limits."""

    run: str = setting("", "A run whose base is served; empty takes the newest", path=True, **WHAT)
    adapter: tuple[str, ...] = setting(
        (), "A LoRA run to offer; may be repeated; without it, all that were trained on the base", **WHAT
    )
    host: str = setting(
        "127.0.0.1", "The address to listen on; others than this machine's own need SERVE_API_KEY",
        pattern=r"[0-9A-Za-z.:_-]{1,253}", allowed="a host's name or address", **WHERE,
    )  # fmt: skip
    port: int = setting(8000, "The port; 0 takes a free one", low=0, high=65535, **WHERE)
    at_once: int = setting(16, "Texts generated at once", low=1, high=1024, **LIMITS)
    waiting: int = setting(256, "Texts that may wait; beyond that, requests are refused", low=0, high=100_000, **LIMITS)
    max_tokens: int = setting(1024, "Longest text, in tokens", low=1, high=10**6, **LIMITS)
    max_body: int = setting(2**20, "Largest request, in bytes", low=1, high=2**30, **LIMITS)
    max_seconds: float = setting(300.0, "Longest request, in seconds", low=0.1, high=10**6, **LIMITS)


def serve(options: ServerSettings, show: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, and finish what has begun.

    show(url) is called as soon as the server listens; where it is given, the playground's page is there.
    Raises UserError for what cannot be served, and whatever the engine fails with.
    """
    key, root = serve_api_key(), Path(options.checkpoints_dir)
    with importing(), needs_package("uvicorn", "serve"), needs_package("starlette", "serve"):
        from jobs.serving.app import Limits, Server
        from jobs.serving.engine import Engine
        from jobs.serving.listening import LOOPBACK, hosts_of, listen, run_until_told, stop, url_of
        from jobs.serving.offers import Offers
        from jobs.serving.playground import pages_of
        from runtime.device import pick_machine
    if options.host not in LOOPBACK and not key:
        raise UsageError(
            f"--host {options.host} lets others in: set SERVE_API_KEY, in the environment or in .env, to a key that "
            "clients must send"
        )
    machine, listening = pick_machine(options.device, options.dtype), listen(options.host, options.port)
    offers = Offers.open(root, options.run, options.adapter)
    model = offers.base.model.requires_grad_(False).to(machine.device)
    limits = Limits(options.max_tokens, options.max_body, options.max_seconds)
    with Engine(model, list(offers.attached.values()), machine, options.at_once, options.waiting, stop) as engine:
        server, url = Server(offers, engine, limits, key, time.time()), url_of(listening)
        flags = [f"--{name}={value}" for name in ("device", "dtype") if (value := getattr(options, name)) != "auto"]
        app = server.app(hosts_of(options.host), pages_of(server, root, flags) if show else ())
        say(f"Serving {', '.join(offers.models)} on {machine}")
        say(f"{url}/v1 is the base URL for clients; Ctrl-C ends it")
        if show:
            show(url)
        run_until_told(app, listening, options.max_seconds)
    if engine.failure:
        raise engine.failure
    say("Stopped; what had begun was finished")
