"""HTTP with the standard library: ask a server, and read its reply whole or as a stream. Knows nothing of the cases."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...r1.errors import UserError

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # DeepSeek's, vLLM's and Ollama's names


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.param = param


class Broken(Exception):
    """The connection broke, or what came over it cannot be read."""


@dataclass(slots=True)
class Reply:
    """The first choice of a chat completion, however it came."""

    reasoning: str = ""
    content: str = ""
    finish: str | None = None
    closed_by: str | None = None  # `reasoning_closed_by`, where the server tells it
    usage: dict[str, Any] = field(default_factory=dict)
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # of `content`, in OpenAI's sense
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    head: dict[str, Any] = field(default_factory=dict)  # the other top-level fields
    chunks: list[dict[str, Any]] = field(default_factory=list)  # streamed only: every event
    comments: list[float] = field(default_factory=list)  # streamed only: when a comment came, s from the start
    done: bool = False  # streamed only: `[DONE]` came

    @property
    def reasoning_tokens(self) -> int | None:
        """As OpenAI tells them, or at the top level as SGLang does."""
        details = self.usage.get("completion_tokens_details") or {}
        told = details.get("reasoning_tokens", self.usage.get("reasoning_tokens"))
        return told if isinstance(told, int) else None

    @property
    def completion_tokens(self) -> int:
        """0 where the server does not tell."""
        return self.usage.get("completion_tokens") or 0

    @property
    def cached_tokens(self) -> int | None:
        """How much of the prompt was found in the KV cache."""
        told = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return told if isinstance(told, int) else None

    @property
    def deltas(self) -> list[dict[str, Any]]:
        """The deltas of the first choice."""
        choices = (choice for chunk in self.chunks for choice in chunk.get("choices") or ())
        return [choice.get("delta") or {} for choice in choices if choice.get("index", 0) == 0]

    def shown(self) -> str:
        """In a few words, for a table."""
        return f"thoughts {_short(self.reasoning)}, answer {_short(self.content)}, finish {self.finish}"


def thoughts_of(message: dict[str, Any]) -> str:
    """The thoughts in a message or a delta, under any of their names."""
    return next((message[name] for name in REASONING_FIELDS if isinstance(message.get(name), str)), "")


def read_reply(body: dict[str, Any]) -> Reply:
    """A reply that came in one object. Raises `Broken` where it is none."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        return Reply(
            reasoning=thoughts_of(message),
            content=message.get("content") or "",
            finish=choice.get("finish_reason"),
            closed_by=choice.get("reasoning_closed_by"),
            usage=body.get("usage") or {},
            logprobs=(choice.get("logprobs") or {}).get("content") or [],
            tool_calls=message.get("tool_calls") or [],
            head={name: value for name, value in body.items() if name not in ("choices", "usage")},
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Broken(f"this is no chat completion: {json.dumps(body)[:80]}") from None


def gather(chunks: list[dict[str, Any]]) -> Reply:
    """A streamed reply put together."""
    reply = Reply(chunks=chunks)
    for chunk in chunks:
        reply.usage = chunk.get("usage") or reply.usage
        reply.head |= {name: value for name, value in chunk.items() if name not in ("choices", "usage")}
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0):
                continue
            delta = choice.get("delta") or {}
            reply.reasoning += thoughts_of(delta)
            reply.content += delta.get("content") or ""
            reply.logprobs += (choice.get("logprobs") or {}).get("content") or []
            reply.finish = choice.get("finish_reason") or reply.finish
            reply.closed_by = choice.get("reasoning_closed_by") or reply.closed_by
            _add_tool_calls(reply.tool_calls, delta.get("tool_calls") or ())
    return reply


class Client:
    """One server, by its base URL (`http://host:port/v1`)."""

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UserError(f"{base_url!r} is not the address of a server", "write http://127.0.0.1:8000/v1")
        self._secure = parts.scheme == "https"
        self._address = (parts.hostname, port or (443 if self._secure else 80))
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.base_url = base_url
        self.api_key = api_key
        self.timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        """JSON, or text where it is not JSON."""
        return self._whole("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON in, JSON out."""
        return self._whole("POST", path, body)

    def chat(self, body: dict[str, Any]) -> Reply:
        """A whole reply."""
        return read_reply(self.post("/v1/chat/completions", body))

    def chat_streamed(self, body: dict[str, Any]) -> Reply:
        """The same, streamed and put together."""
        with self.stream(body) as stream:
            chunks = list(stream)
        reply = gather(chunks)
        reply.comments, reply.done = stream.comments, stream.done
        return reply

    @contextmanager
    def stream(self, body: dict[str, Any]) -> Iterator[Stream]:
        """A stream to read event by event. Leaving hangs up."""
        connection = self._connect()
        try:
            response = self._ask(connection, "POST", "/v1/chat/completions", body | {"stream": True})
            if response.status != 200:
                raise _refusal(response.status, response.read())
            yield Stream(response)
        except (OSError, http.client.HTTPException) as error:
            raise _broken(error, self.timeout_s) from None
        finally:
            connection.close()

    def _whole(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        connection = self._connect()
        try:
            response = self._ask(connection, method, path, body)
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _broken(error, self.timeout_s) from None
        finally:
            connection.close()
        if response.status >= 400:
            raise _refusal(response.status, data)
        try:
            return json.loads(data)
        except ValueError:
            return data.decode(errors="replace")

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(*self._address, timeout=self.timeout_s)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, self._prefix + path, data, self._headers)
        return connection.getresponse()


class Stream:
    """The events of one stream, as they come. Iterate once."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self._began = time.monotonic()
        self.comments: list[float] = []
        self.done = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield every event but `[DONE]`. Raises `Refused` for an event that tells an error."""
        return (event for event in self.with_comments() if event is not None)

    def with_comments(self) -> Iterator[dict[str, Any] | None]:
        """The same, with `None` for a comment."""
        while line := self._response.readline():
            if line.startswith(b":"):
                self.comments.append(time.monotonic() - self._began)
                yield None
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self.done = True
                continue
            try:
                event = json.loads(data)
            except ValueError:
                raise Broken(f"an event is not JSON: {data[:60]!r}") from None
            if isinstance(event, dict) and event.get("error"):
                raise _refusal(200, data)
            yield event


def _refusal(status: int, data: bytes) -> Refused:
    text = data.decode(errors="replace")
    try:
        body = json.loads(text)
        error = body.get("error", body)
        message = error if isinstance(error, str) else error.get("message") or error.get("detail") or text
        return Refused(status, str(message), error.get("param") if isinstance(error, dict) else None)
    except (ValueError, AttributeError):
        return Refused(status, text.strip() or "no words")


def _broken(error: Exception, timeout_s: float) -> Broken:
    if isinstance(error, TimeoutError):
        return Broken(f"nothing came for {timeout_s:g} s")
    if isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | http.client.IncompleteRead):
        return Broken("the server hung up in the middle")
    return Broken(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _add_tool_calls(calls: list[dict[str, Any]], deltas: Any) -> None:
    for delta in deltas:
        while len(calls) <= delta.get("index", 0):
            calls.append({"function": {"name": "", "arguments": ""}})
        function = calls[delta.get("index", 0)]["function"]
        told = delta.get("function") or {}
        function["name"] += told.get("name") or ""
        function["arguments"] += told.get("arguments") or ""


def _short(text: str) -> str:
    return repr(text) if len(text) <= 24 else f"{text[:14]!r}…{text[-6:]!r}"
