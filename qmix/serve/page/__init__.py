"""The page to chat on: files that this package holds, sent as they are, from memory.

    /             index.html, for those that accept HTML
    /page/NAME    the scripts and styles that it asks for

The page asks for nothing from anywhere else, and its Content-Security-Policy keeps it so: whatever a model writes, a
browser neither runs it nor fetches anything for it. Requests name keys of a table that is read at the start, so that no
path from a request reaches the file system.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

PREFIX = "/page/"
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
         "svg": "image/svg+xml", "txt": "text/plain; charset=utf-8"}
# Trusted Types: of all scripts only DOMPurify may make HTML of a text.
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types dompurify"))
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
           "Permissions-Policy": "camera=(), microphone=(), geolocation=()", "Cache-Control": "no-cache"}


class PageFile(NamedTuple):
    """etag: changes with the bytes."""

    data: bytes
    kind: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """{"index.html": its file, "vendor/marked.js": ...}, as the package has them."""
    return _read(resources.files(__name__) / "static", "")


def _read(folder: Traversable, prefix: str) -> dict[str, PageFile]:
    found: dict[str, PageFile] = {}
    for one in folder.iterdir():
        if one.is_dir():
            found |= _read(one, f"{prefix}{one.name}/")
        elif (kind := TYPES.get(one.name.rpartition(".")[2])) is not None:
            data = one.read_bytes()
            found[prefix + one.name] = PageFile(data, kind, f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return found


def is_page(path: str) -> bool:
    """Whether a path belongs to the page, which holds nothing secret: it asks for the key itself."""
    return path == "/" or path.startswith(PREFIX)


def accepts_html(accept: str) -> bool:
    """Whether an Accept header names text/html, and not with q=0, which refuses it (RFC 9110, 12.4.2)."""
    for one in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in one.split(";"))
        if kind == "text/html":
            return not any(re.fullmatch(r"q\s*=\s*0(\.0*)?", part) for part in parameters)
    return False


def page_router(files: Mapping[str, PageFile]) -> APIRouter:
    """The routes of the page."""
    router = APIRouter()

    def send(request: Request, name: str) -> Response:
        """304 where the browser has the file."""
        if (file := files.get(name)) is None:
            raise HTTPException(404, "Not Found")
        headers = {**HEADERS, "ETag": file.etag}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.data, headers=headers, media_type=file.kind)

    async def index(request: Request) -> Response:
        """The page for browsers; a line for programs that look whether there is a server, as ollama's do."""
        found = send(request, "index.html") if accepts_html(request.headers.get("accept", "")) else \
            PlainTextResponse("qmix is running\n")
        found.headers["Vary"] = "Accept"
        return found

    async def part(request: Request, name: str) -> Response:
        return send(request, name)

    router.add_api_route("/", index, methods=["GET", "HEAD"], include_in_schema=False)
    router.add_api_route(PREFIX + "{name:path}", part, methods=["GET", "HEAD"], include_in_schema=False)
    return router
