"""The viewer's requests: who may ask, what, and in which thread it is answered."""

from __future__ import annotations

import hmac
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from wsi_pipe.cores import available_cores
from wsi_pipe.errors import ConfigError, WsiPipeError
from wsi_pipe.pages import asset
from wsi_pipe.view.answers import Answers, NotThereError
from wsi_pipe.view.catalogue import Catalogue

__all__ = ["make_app"]

T = TypeVar("T")

STATIC = {
    "view.css": "text/css",
    "view.js": "text/javascript",
    "paint.js": "text/javascript",
    "openseadragon.min.js": "text/javascript",
}
"""Files that the page asks for, and nothing else of the package."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HOSTS = ("127.0.0.1", "localhost")
"""Names under which a browser may ask: a page elsewhere whose name was made to point here has another."""


def make_app(catalogue: Catalogue, token: str, *, threads: int | None = None) -> Starlette:
    """The viewer's ASGI application, which only reads.

    token: first part of every path; whoever does not know it gets 404, whatever else they ask. threads: how many
    requests are answered at a time (default: the cores that this process may use); the others wait, and are dropped
    where the browser no longer wants them when their turn comes.
    """
    answers = Answers(catalogue)
    turns = anyio.CapacityLimiter(threads or available_cores())

    async def answer(request: Request, work: Callable[[], T]) -> T | None:
        """What ``work`` gives, made in a thread, or None where nobody waits for it any more."""
        async with turns:
            if await request.is_disconnected():
                return None
            return await anyio.to_thread.run_sync(work)

    def route(path: str, respond: Callable[[Request], Awaitable[Response]]) -> Route:
        async def guarded(request: Request) -> Response:
            if not hmac.compare_digest(request.path_params["token"].encode(), token.encode()):
                return Response("not found", 404, headers=HEADERS)
            try:
                response = await respond(request)
            except NotThereError as error:
                response = JSONResponse({"error": str(error)}, 404)
            except (ConfigError, ValueError) as error:
                response = JSONResponse({"error": str(error)}, 400)
            except WsiPipeError as error:
                # The slide's fault, not the page's: it shows what is wrong and goes on.
                response = JSONResponse({"error": str(error)}, 422)
            response.headers.update(HEADERS)
            return response

        return Route("/{token}" + path, guarded, methods=["GET"])

    def as_json(work: Callable[[Request], Callable[[], Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            found = await answer(request, work(request))
            return _dropped() if found is None else JSONResponse(found, headers={"Cache-Control": "no-cache"})

        return respond

    def as_bytes(kind: str, work: Callable[[Request], Callable[[], bytes]]) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            found = await answer(request, work(request))
            kept = {"Cache-Control": "private, max-age=3600"}
            return _dropped() if found is None else Response(found, media_type=kind, headers=kept)

        return respond

    async def page(request: Request) -> Response:
        return Response(page_html(), media_type="text/html")

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise NotThereError(f"there is no file {name}")
        text = static_text(name)
        return Response(text, media_type=STATIC[name], headers={"Cache-Control": "private, max-age=3600"})

    def number(request: Request) -> int:
        return int(request.path_params["number"])

    def of_tile(request: Request) -> tuple[int, str, int]:
        return number(request), str(request.path_params["label"]), int(request.path_params["row"])

    async def nearest(request: Request) -> Response:
        # A search through a job goes on for long: it ends where the browser has gone.
        gone = threading.Event()

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone.set()

        encoder = request.query_params.get("encoder", "")
        everywhere = request.query_params.get("in") == "job"
        work = partial(answers.nearest, *of_tile(request), encoder, everywhere, gone.is_set)
        found: list[dict[str, Any]] = []
        failed: WsiPipeError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                found = await anyio.to_thread.run_sync(work)
            except WsiPipeError as error:
                # Out of a task group it would come as a group of errors.
                failed = error
            tasks.cancel_scope.cancel()
        if failed is not None:
            raise failed
        return JSONResponse(found)

    def trial(request: Request) -> Callable[[], Any]:
        return partial(answers.trial, number(request), {k: float(v) for k, v in request.query_params.items()})

    def picture(request: Request) -> Callable[[], bytes]:
        place = (int(request.path_params[name]) for name in ("level", "column", "row"))
        return partial(answers.picture, number(request), *place)

    slide = "/slides/{number:int}"
    routes = [
        route("/", page),
        route("/static/{name}", static),
        route("/slides", as_json(lambda request: answers.slides)),
        route(slide, as_json(lambda request: partial(answers.about, number(request)))),
        route(slide + "/thumbnail.jpg", as_bytes("image/jpeg", lambda r: partial(answers.thumbnail, number(r)))),
        route(slide + "/pictures/{level:int}/{column:int}_{row:int}.jpg", as_bytes("image/jpeg", picture)),
        route(slide + "/grids/{label}", as_json(lambda r: partial(answers.grid, number(r), r.path_params["label"]))),
        route(
            slide + "/layers/{label}/{key:path}",
            as_json(lambda r: partial(answers.layer, number(r), r.path_params["label"], r.path_params["key"])),
        ),
        route(
            slide + "/tiles/{label}/{row:int}.png", as_bytes("image/png", lambda r: partial(answers.tile, *of_tile(r)))
        ),
        route(slide + "/tiles/{label}/{row:int}/nearest", nearest),
        route(slide + "/trial", as_json(trial)),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        answers.close()

    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False),
        Middleware(GZipMiddleware, minimum_size=2048, compresslevel=5),
    ]
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)


def _dropped() -> Response:
    """The browser has gone on to another view; nobody reads this."""
    return Response(status_code=499)


def static_text(name: str) -> str:
    """A file of the page: its own styles follow those that all pages share."""
    own = resources.files("wsi_pipe.view").joinpath("static").joinpath(name).read_text(encoding="utf-8")
    return asset("wsi_pipe.pages", "theme.css") + "\n" + own if name == "view.css" else own


def page_html() -> str:
    """The page itself, which holds no data."""
    return resources.files("wsi_pipe.view").joinpath("static").joinpath("view.html").read_text(encoding="utf-8")
