"""The server's pages: which models there are, completions, and chats."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jobs.serving.answers import Chat, Completion, error_body, event
from jobs.serving.bodies import CHAT, COMPLETION, Field, RefusedError, read_body
from jobs.serving.calls import Call
from jobs.serving.engine import Engine, FailedError, FullError
from jobs.serving.offers import Offers
from jobs.serving.texts import Piece, pieces_of

T = TypeVar("T")
GONE = Response(status_code=499)  # nobody reads it


@dataclass(frozen=True)
class Limits:
    """What one request may take: tokens of a text, bytes of a body, seconds in all."""

    tokens: int
    body: int
    seconds: float


class Server:
    """What answers requests. key: that clients must send, "" for none. began: when, in seconds since 1970."""

    def __init__(self, offers: Offers, engine: Engine, limits: Limits, key: str, began: float) -> None:
        self.offers, self.engine, self.limits, self.key, self.began = offers, engine, limits, key, int(began)

    def app(self, hosts: list[str], pages: Sequence[Route] = ()) -> Starlette:
        """The application. hosts: the names under which it may be asked; ["*"] for any. pages: what else there is."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chats, methods=["POST"]),
                *pages,
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers=ANSWERS_TO,
        )

    async def health(self, request: Request) -> Response:
        """Whether texts can be made, and how many are."""
        made, waiting = self.engine.busy
        told = {"status": "failed" if self.engine.failure else "ok", "made": made, "waiting": waiting}
        return JSONResponse(told, 500 if self.engine.failure else 200)

    async def models(self, request: Request) -> Response:
        """All models."""
        self.check_client(request)
        return JSONResponse({"object": "list", "data": [self.about(name) for name in self.offers.models]})

    async def model(self, request: Request) -> Response:
        """One model."""
        self.check_client(request)
        if (name := request.path_params["name"]) not in self.offers.models:
            raise RefusedError(404, f"there is no model {name[:100]!r} here", "model", "model_not_found")
        return JSONResponse(self.about(name))

    def about(self, name: str) -> dict[str, Any]:
        """What is told of a model; an adapter also says of which base it is."""
        base = self.offers.base.run.name
        about = {"id": name, "object": "model", "created": self.began, "owned_by": "local"}
        return about if name == base else about | {"parent": base}

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        return await self.answer(request, COMPLETION, Completion)

    async def chats(self, request: Request) -> Response:
        """Say what comes next in a chat."""
        return await self.answer(request, CHAT, Chat)

    async def answer(self, request: Request, fields: Mapping[str, Field], kind: type[Completion]) -> Response:
        """Make what is asked for; a client that has gone frees its places."""
        self.check_client(request)
        body = read_body(await self.read(request), fields, self.limits.tokens)
        call = Call.of(body, self.offers, self.limits.tokens)
        if (count := len(call.prompts) * call.choices) > (most := self.engine.places + self.engine.most):
            raise RefusedError(400, f"this asks for {count} texts at once, and {most} have room here", "n")
        answer, pieces = kind(call), self.in_time(pieces_of(call, self.engine, self.offers.base.tokenizer))
        if not call.streamed:
            found = await until_gone(request, collected(pieces))
            return GONE if found is None else JSONResponse(answer.answer(found))
        first = await until_gone(request, first_of(pieces))  # so that a full queue is an error, and no broken stream
        if first is None:
            return GONE
        return StreamingResponse(streamed(answer, first, pieces), media_type="text/event-stream")

    async def in_time(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        """The same, up to the time that a request may take."""
        late = asyncio.get_running_loop().time() + self.limits.seconds
        try:
            while True:
                async with asyncio.timeout_at(late):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                yield piece
        except TimeoutError:
            message = f"this took more than {self.limits.seconds:g} seconds; ask for fewer tokens, or try again later"
            raise RefusedError(408, message, code="timeout") from None
        finally:
            await pieces.aclose()

    def check_client(self, request: Request) -> None:
        """Raises RefusedError where a request lacks the key, or comes from a page of another server in a browser, which
        would send it without asking whoever looks at the page."""
        origin = request.headers.get("origin", "")
        if origin and urlsplit(origin).netloc != request.headers.get("host"):
            raise RefusedError(403, f"requests of pages of {origin[:100]} are not answered", code="other_origin")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise RefusedError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def read(self, request: Request) -> bytes:
        """The body. Raises RefusedError as soon as it is too long."""
        data, most = b"", self.limits.body
        length = request.headers.get("content-length", "")
        too_long = RefusedError(413, f"the body has more than {most:,} bytes")
        if length.isdigit() and int(length) > most:
            raise too_long
        async for some in request.stream():
            data += some
            if len(data) > most:
                raise too_long
        return data


async def collected(pieces: AsyncIterator[Piece]) -> list[Piece]:
    """All pieces."""
    return [piece async for piece in pieces]


async def first_of(pieces: AsyncIterator[Piece]) -> Piece:
    """The first piece."""
    return await anext(pieces)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What comes of the work, or None where the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def streamed(answer: Completion, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    """The events of an answer."""
    told = [first]
    try:
        for each in (*answer.first(), *answer.events(first)):
            yield each
        async for piece in pieces:
            told.append(piece)
            for each in answer.events(piece):
                yield each
        for each in answer.last(told):
            yield each
    except RefusedError as error:
        yield event(error_body(error))
    except FailedError:
        yield event(error_body(FAILED))
    finally:
        await pieces.aclose()


FAILED = RefusedError(500, "the server has failed; its terminal says why")


async def _refused(request: Request, error: RefusedError) -> Response:
    return JSONResponse(error_body(error), error.status)


async def _not_here(request: Request, error: HTTPException) -> Response:
    return await _refused(request, RefusedError(error.status_code, f"{request.url.path}: {error.detail}"))


async def _full(request: Request, error: FullError) -> Response:
    refused = RefusedError(429, "as many texts are waiting as may; try again later", code="queue_full")
    return JSONResponse(error_body(refused), 429, {"Retry-After": "1"})


async def _failed(request: Request, error: FailedError) -> Response:
    return JSONResponse(error_body(FAILED), 500)


ANSWERS_TO = {RefusedError: _refused, HTTPException: _not_here, FullError: _full, FailedError: _failed}
