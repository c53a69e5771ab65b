"""The playground's page: its files, and what it must know of the models that the protocol does not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from jobs.generating.choice import name_in
from jobs.serving.app import Server
from jobs.serving.calls import OF_SAMPLING
from runtime.start import command_line

FOLDER = Path(__file__).parent / "page"
FILES = {"/": "index.html"} | {f"/page/{name}": name for name in ("page.js", "style.css", "icon.svg")}
# Scripts, styles and requests of this server's own alone, and no text that becomes markup.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def pages_of(server: Server, root: Path, flags: Sequence[str]) -> list[Route]:
    """The page, and what it asks for besides the protocol. root: the folder of all runs. flags: with which generate.py
    computes as this server does."""
    about = about_models(server, root, flags)

    async def told(request: Request) -> Response:
        server.check_client(request)
        return JSONResponse(about, headers=HEADERS)

    async def file(request: Request) -> Response:
        return FileResponse(FOLDER / FILES[request.url.path], headers=HEADERS)

    return [Route("/page/about", told), *(Route(path, file) for path in FILES)]


def about_models(server: Server, root: Path, flags: Sequence[str]) -> dict[str, Any]:
    """What the page must know. command: how generate.py is called for the base; word: what a model is called there.
    chat: whether it has a template; sampling: how tokens are drawn where a request does not say."""
    offers = server.offers
    runs = {offers.base.run.name: offers.base.run, **offers.adapters}
    words = {name: name_in(root, run) for name, run in runs.items()}
    return {
        "command": command_line("generate.py", "--run", words[offers.base.run.name], *flags),
        "context": offers.base.model.config.max_positions,
        "max_tokens": server.limits.tokens,
        "key": bool(server.key),
        "models": [
            server.about(name)
            | {"word": words[name], "chat": offer.template is not None}
            | {"sampling": {name: value for name, value in asdict(offer.how).items() if name in OF_SAMPLING}}
            for name, offer in offers.models.items()
        ],
    }
