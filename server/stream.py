"""Server-sent events on the wire. Knows nothing of what is in them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from anyio import CancelScope
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
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
            sep="\n",
        )
        self._at_end = at_end
        self._sending_since: float | None = None  # s, where the client has not taken the last event yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all. `at_end` is called even where the client went before the first event."""
        try:
            with CancelScope() as patience:
                self._watch(patience)
                await super().__call__(scope, receive, send)
            if patience.cancel_called:
                log.warning("a client read nothing for %g s; its stream is given up", _SEND_TIMEOUT_S)
        finally:
            self._timer.cancel()
            self._at_end()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Send without a timer for every token, which costs more than all else here: `_watch` looks in at times."""
        self._sending_since = time.monotonic()
        await send(message)
        self._sending_since = None

    def _watch(self, patience: CancelScope) -> None:
        """Give up on a client that reads nothing; look again in a while otherwise."""
        since = self._sending_since
        if since is not None and time.monotonic() - since >= _SEND_TIMEOUT_S:
            patience.cancel()
        self._timer = asyncio.get_running_loop().call_later(_SEND_TIMEOUT_S / 6, self._watch, patience)


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
