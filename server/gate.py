"""The door: who may come in, and with how much. Plain ASGI, before any route; knows nothing of what is asked.

`/health`, `/ready` and their like are open to everybody, so that a supervisor needs no key, and so is the chat page,
which asks its reader for one. Everything else is closed by default.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics
from .page import is_page
from .settings import Settings, key_hash

_OPEN_PATHS = ("/health", "/ready", "/health/live", "/health/ready")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Gate:
    """Checks host, origin, key and size of every request."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._refuse(scope, headers)
        if error:
            self._metrics.refused.labels("", str(error.status)).inc()
            await error.response()(scope, receive, send)
            return
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._settings.max_body:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _refuse(self, scope: Scope, headers: Headers) -> ApiError | None:
        settings = self._settings
        if settings.local_only and not settings.key_hashes and _host(headers.get("host", "")) not in _LOCAL_NAMES:
            # A web page can point its own name at 127.0.0.1 (DNS rebinding) and call us in its visitor's name.
            return ApiError(
                403, "this server answers to localhost only; it was called by another name", code="bad_host"
            )
        origin = headers.get("origin")
        if origin and not self._is_allowed(origin, headers.get("host", "")):
            return ApiError(
                403, f"pages of {origin[:200]} may not call this server; allow them with --cors", code="bad_origin"
            )
        method, path = scope["method"], scope["path"]
        is_open = path in _OPEN_PATHS or method == "OPTIONS" or is_page(method, path)
        if settings.key_hashes and not is_open:
            given = headers.get("authorization", "")
            key = given[7:].strip() if given[:7].lower() == "bearer " else headers.get("x-api-key", "")
            found = False
            given_hash = key_hash(key.encode("latin-1").decode(errors="surrogateescape"))  # headers come as Latin-1
            for known in settings.key_hashes:  # all of them, whatever is found: the time must tell nothing
                found |= hmac.compare_digest(given_hash, known)
            if not found:
                words = "that is not one of this server's API keys" if key else "this server wants an API key"
                return ApiError(
                    401,
                    f"{words}; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > settings.max_body:
            return self._too_large()
        return None

    def _is_allowed(self, origin: str, host: str) -> bool:
        if "*" in self._settings.origins or origin in self._settings.origins:
            return True
        return origin.partition("://")[2] == host

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body // (1024 * 1024)
        return ApiError(
            413, f"the request is larger than {limit} MB; the server's --max-body sets the limit", code="body_too_large"
        )


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    header = header.lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header
