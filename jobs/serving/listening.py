"""Where a server listens, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import socket
from typing import Any

import uvicorn

from runtime.errors import UserError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where that cannot be."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", 0) == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken by another program; choose another --port") from None
        raise UserError(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}") from None


def hosts_of(host: str) -> list[str]:
    """The names under which a server may be asked. On the loopback interface only its own: a page of the web that a
    browser shows must not reach it by a name that it has made lead here."""
    return ["localhost", "127.0.0.1", "[::1]"] if host in LOOPBACK else ["*"]


def url_of(listening: socket.socket) -> str:
    """The address at which a socket listens."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def stop() -> None:
    """End as SIGTERM does."""
    os.kill(os.getpid(), signal.SIGTERM)


def run_until_told(app: Any, listening: socket.socket, patience: float) -> None:
    """Serve until SIGTERM or Ctrl-C comes, then finish what has begun, in so many seconds at most.

    A second Ctrl-C does not wait.
    """
    config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", server_header=False,
                            timeout_graceful_shutdown=max(1, int(patience)))  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn has its own while it runs, and raises the signal again after
    uvicorn.Server(config).run(sockets=[listening])
