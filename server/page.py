"""The chat page at `/`: which files there are, and the headers they come with.

It knows nothing of models and replies: the page asks the API like any other client. The files lie in `server/page/`
and are read once; no path of a request ever reaches the disk.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import cached_property
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response

FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    "": "text/plain; charset=utf-8",  # the licences
}
_SECURITY = {
    # Nothing from elsewhere, nothing inline, no string made into HTML but by DOMPurify's hands.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "font-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class _File:
    """One file of the page, and what is sent with it."""

    def __init__(self, path: Path) -> None:
        self.body = path.read_bytes()
        self.etag = f'"{hashlib.sha256(self.body).hexdigest()[:24]}"'
        # Vendored files change with their folder's name, which tells the version; ours are asked for again.
        caching = "public, max-age=31536000, immutable" if "vendor" in path.relative_to(FOLDER).parts else "no-cache"
        self.headers = {"Content-Type": _TYPES[path.suffix], "ETag": self.etag, "Cache-Control": caching} | _SECURITY
        if path.suffix != ".woff2":  # those are compressed as they are
            self.headers["Vary"] = "Accept-Encoding"

    @cached_property
    def zipped(self) -> bytes:
        """The body with gzip: a third, for a phone on the other side of a wireless network."""
        return gzip.compress(self.body, mtime=0)

    def answer(self, request: Request) -> Response:
        """The whole response; 304 to who has the file already."""
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self.headers)
        if "Vary" in self.headers and "gzip" in request.headers.get("accept-encoding", ""):
            return Response(self.zipped, headers=self.headers | {"Content-Encoding": "gzip"})
        return Response(self.body, headers=self.headers)


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files under `/page/`; what else lies in the folder stays there."""
    found = (path for path in FOLDER.rglob("*") if path.is_file() and path.suffix in _TYPES)
    files = {path.relative_to(FOLDER).as_posix(): _File(path) for path in found}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return files["index.html"].answer(request)

    @app.api_route("/page/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name].answer(request)


def is_page(method: str, path: str) -> bool:
    """Whether a request is for the page alone: it holds no secrets, and whoever has a key types it there."""
    return method in ("GET", "HEAD") and (path == "/" or path.startswith("/page/"))
