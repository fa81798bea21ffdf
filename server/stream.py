"""Server-sent events on the wire. Knows nothing of what is in them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from .errors import as_api_error

log = logging.getLogger("stillhouse")
KEEP_ALIVE_S = 15  # proxies give up on silent connections, often after 60 s
_SEND_TIMEOUT_S = 30  # a client that reads nothing for so long is gone
DONE = b"data: [DONE]\n\n"

# Draining is ours (`app.py`): streams in progress go on until the grace time is over.
AppStatus.disable_automatic_graceful_drain()

T = TypeVar("T")


class EventStream(EventSourceResponse):
    """A response that sends ready-made events, a comment every 15 s, and an error event if they break off."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, headers: dict[str, str], at_end: Callable[[], None]
    ) -> None:
        super().__init__(
            _with_error(events),
            headers=headers,
            ping=KEEP_ALIVE_S,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            send_timeout=_SEND_TIMEOUT_S,
            sep="\n",
        )
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all. `at_end` is called even where the client went before the first event."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("a client read nothing for %g s; its stream is given up", _SEND_TIMEOUT_S)
        finally:
            self._at_end()


async def _with_error(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except Exception as error:  # the status line is sent: all that can still be told is an event
            yield as_api_error(error).event()


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """Wait for work that only this client wants; `None`, and the work cancelled, once it has hung up."""
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        return job.result() if job.done() else None
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
