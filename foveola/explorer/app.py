"""The addresses of the page: fixed files of this package, and answers by index, never by path."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from foveola.config import UserError
from foveola.explorer.guard import Guard
from foveola.explorer.session import Session

PAGE_FILES = Path(__file__).parent / "page"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LARGEST_QUESTION = 2**24  # bytes of what is posted
HELD_HOUR = {"cache-control": "private, max-age=3600"}  # addresses have the version of the page in them
UNHELD_HOUR = {"cache-control": "no-store"}


def application(session: Session, token: str, host: str, cookie: str = "foveola") -> Guard:
    """Return the application of a page, behind its guard."""
    files = {path.name: path for path in PAGE_FILES.iterdir() if path.suffix in MEDIA_TYPES}

    def page_file(request: Request) -> Response:
        path = files[request.path_params.get("name", "index.html")]
        media = f"{MEDIA_TYPES[path.suffix]}; charset=utf-8"
        return Response(path.read_bytes(), media_type=media, headers=UNHELD_HOUR)

    def rows(request: Request) -> Response:
        made = session.shown(request.path_params["kind"]).as_json
        return Response(made, media_type="application/json", headers=UNHELD_HOUR)

    def layout(request: Request) -> Response:
        params = request.path_params
        made = session.map(params["kind"], _side(session, request), params["method"])
        if made is None:
            return JSONResponse({"state": "at work"}, 202, UNHELD_HOUR)
        return Response(made, media_type="application/octet-stream", headers=UNHELD_HOUR)

    def thumbnail(request: Request) -> Response:
        params = request.path_params
        made = session.thumbnail(params["image"], params.get("object", -1))
        return Response(made, media_type="image/jpeg", headers=HELD_HOUR)

    def image(request: Request) -> Response:
        made = session.image(request.path_params["image"])
        return Response(made, media_type="image/jpeg", headers=HELD_HOUR)

    def about(request: Request) -> Response:
        return JSONResponse(session.about(request.path_params["image"]), headers=UNHELD_HOUR)

    def layer(request: Request) -> Response:
        params, query = request.path_params, request.query_params
        try:
            point = float(query.get("x", "0.5")), float(query.get("y", "0.5"))
            head = int(query.get("head", "0"))
        except ValueError as error:
            raise UserError("x, y and head are numbers") from error
        if not all(0 <= fraction <= 1 for fraction in point):
            raise UserError("x and y are from 0 to 1")
        made = session.layer(_side(session, request), params["image"], params["what"], point, head)
        return JSONResponse(made, headers=UNHELD_HOUR)

    def state(_: Request) -> Response:
        return JSONResponse(session.state(), headers=UNHELD_HOUR)

    routes = [
        Route("/", _told(page_file)),
        Route("/page/{name}", _told(page_file)),
        Route("/state", _told(state)),
        Route("/rows/{kind}", _told(rows)),
        Route("/map/{kind}/{side:int}/{method}", _told(layout)),
        Route("/thumbnail/{image:int}", _told(thumbnail)),
        Route("/thumbnail/{image:int}/{object:int}", _told(thumbnail)),
        Route("/image/{image:int}", _told(image)),
        Route("/about/{image:int}", _told(about)),
        Route("/layer/{side:int}/{image:int}/{what}", _told(layer)),
        Route("/ask", _posted(session.ask), methods=["POST"]),
        Route("/selection", _posted(session.selection), methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), token, host, cookie)


def _side(session: Session, request: Request) -> int:
    side = request.path_params["side"]
    if not 0 <= side < len(session.sides):
        raise LookupError(f"there is no side {side}")
    return side


def _told(function: Callable[[Request], Response]) -> Callable[[Request], Any]:
    """Compute an answer in a thread; mistakes are sent as JSON, with the reason alone."""

    async def endpoint(request: Request) -> Response:
        try:
            return await run_in_threadpool(function, request)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400, UNHELD_HOUR)
        except LookupError:
            return JSONResponse({"error": "there is no such thing"}, 404, UNHELD_HOUR)

    return endpoint


def _posted(function: Callable[[Any], Any]) -> Callable[[Request], Any]:
    """Answer to values in JSON."""

    async def endpoint(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_QUESTION:
                return JSONResponse({"error": "that is too much at once"}, 413, UNHELD_HOUR)
        if not request.headers.get("content-type", "").startswith("application/json"):
            return JSONResponse({"error": "expected JSON"}, 415, UNHELD_HOUR)
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            return JSONResponse({"error": "expected JSON"}, 400, UNHELD_HOUR)
        return await _told(lambda _: JSONResponse(function(values), headers=UNHELD_HOUR))(request)

    return endpoint
