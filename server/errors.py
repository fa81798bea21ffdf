"""One table: what went wrong -> HTTP status and OpenAI error object. Nothing else in the server writes an error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from ..backends.base import BackendFailed, PromptTooLong
from ..r1.errors import BadPrompt, UserError
from .upstream import UpstreamFailed, UpstreamRefused


class ApiError(Exception):
    """An error as OpenAI's clients expect it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _one_line(message)
        self.code = code
        self.param = param
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body, self.status, headers=dict(self.headers or {}))

    def event(self) -> bytes:
        """The same as an event in a stream that has begun."""
        return b"data: " + json.dumps(self.body).encode() + b"\n\n"


_LONGEST = 400  # characters of a message; it may quote what was sent
_MOST_COMPLAINTS = 10_000
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_HTTP_WORDS = {
    404: "there is no such path here",
    405: "this path does not answer that HTTP method",
}


def as_api_error(error: BaseException) -> ApiError:
    """Find the row for any exception. What is not in the table is our own mistake: 500, and nothing leaks."""
    match error:
        case ApiError():
            return error
        case PromptTooLong():
            return ApiError(400, str(error), code="context_length_exceeded", param="messages")
        case BadPrompt():
            return ApiError(400, str(error), param="messages")
        case UpstreamFailed():
            return ApiError(error.status, str(error), code="upstream_failed", headers={"Retry-After": "1"})
        case UpstreamRefused():
            return ApiError(error.status, str(error), code=error.code, param=error.param)
        case BackendFailed():
            return ApiError(503, str(error), code="engine_failed", headers={"Retry-After": "1"})
        case UserError():
            return ApiError(400, str(error))
        case ClientDisconnect():
            return ApiError(499, "the client hung up before its request was whole")  # nobody reads it; it is counted
        case ValidationError():
            return _from_validation(error)
        case HTTPException():
            return ApiError(
                error.status_code, _HTTP_WORDS.get(error.status_code, str(error.detail)), headers=error.headers
            )
        case _:
            return ApiError(500, "the server made a mistake; its log has the details", code="internal_error")


_UNION_MEMBER = re.compile(r"str|int|float|bool|(list|dict|nullable|constrained|function)[\[-].*")
"""What pydantic puts into a path to say which member of a union it tried; no client knows these names."""


def _from_validation(error: ValidationError) -> ApiError:
    """Say the first complaint of pydantic's as a sentence, with the path of the field."""
    if error.error_count() > _MOST_COMPLAINTS:  # to write millions of them down would take a minute
        return ApiError(400, f"the body has {error.error_count()} wrong values", code="invalid_value")
    complaints = error.errors(include_url=False, include_input=False)
    # Of the members of a union each complains; the longest path is the one that came furthest.
    first = max(complaints, key=lambda complaint: len(complaint["loc"]))
    path = _one_line(".".join(str(part) for part in first["loc"] if not _UNION_MEMBER.fullmatch(str(part))))
    words = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not path and first["type"] == "value_error":  # about several fields; the sentence begins with the one to change
        named, _, rest = words.partition(": ")
        path, words = (named, rest) if named.isidentifier() else (path, words)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {words.removeprefix('Invalid JSON: ')}", code="invalid_json")
    if first["type"] == "missing":
        return ApiError(400, f"{path} is required", param=path, code="missing_required_parameter")
    return ApiError(400, f"{path}: {words}" if path else words, param=path or None, code="invalid_value")


def _one_line(text: str) -> str:
    """A text that fits into a log's line: nothing unprintable, and only the two ends of what is very long."""
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 101]}…{text[-100:]}"
    return "".join(character if character.isprintable() else " " for character in text).strip()
