"""Several upstreams as one source of tokens: who is asked, who waits, who is up.

A conversation goes where its beginning was read before, unless that upstream is much busier than another; else the
least busy one is asked. One that fails before its first word is replaced by another; after it, the failure is told.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

from ..backends.base import BackendFailed, Load, Token
from ..r1.errors import UserError
from .upstream import Upstream, UpstreamFailed
from .upstream_reply import Relay, UpstreamRequest

_CHECK_EVERY_S = 5.0
_BUSIER = 4  # replies more than the least busy: then no prefix in the cache is worth the wait
_WORTH = 256  # characters that were read before are worth the wait behind one reply
_REMEMBERED = 50_000  # beginnings of prompts
_BLOCK = 512  # characters of a raw text that count as one beginning

Item = Token | Exception
log = logging.getLogger("stillhouse")


class Upstreams:
    """The upstreams of one server, and the requests they are asked."""

    def __init__(self, members: Sequence[Upstream], parallel: int) -> None:
        self.members = tuple(members)
        self._parallel = parallel * len(members)
        self._places = asyncio.Semaphore(self._parallel)  # whoever waits is served in order
        self._waiting = 0
        self._read: OrderedDict[bytes, set[Upstream]] = OrderedDict()  # beginning of a prompt -> who has read it
        self._relaying: set[asyncio.Task[None]] = set()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._checking: asyncio.Task[None] | None = None
        self._check_now = asyncio.Event()

    def probe(self) -> list[str]:
        """Find out what they are; the troubles of those that are not up. Raises `UserError` where none is."""
        errors: list[UserError] = []

        async def ask(upstream: Upstream) -> None:
            try:
                await upstream.probe()
            except UserError as error:
                upstream.trouble = error.message
                errors.append(error)

        async def ask_all() -> None:
            await asyncio.gather(*map(ask, self.members))

        asyncio.run(ask_all())
        if len(errors) == len(self.members):
            raise errors[0]
        names = {upstream.traits.model for upstream in self.members if upstream.traits}
        if len(names) > 1:
            raise UserError(
                f"the upstreams serve different models: {', '.join(sorted(names))}",
                "one server, one model: start another for the other, or name what all of them serve",
            )
        return [error.message for error in errors]

    def watch_over(self) -> None:
        """Look after the upstreams from now on; on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._checking = self._loop.create_task(self._check_for_ever())

    # What they are, together

    @property
    def up(self) -> list[Upstream]:
        """Those that answer."""
        return [upstream for upstream in self.members if upstream.trouble is None]

    @property
    def can_continue(self) -> bool:
        """Whether a reply that was cut can be gone on with, whoever gives it."""
        return all(upstream.traits.can_continue for upstream in self.members if upstream.traits)

    @property
    def are_ours(self) -> bool:
        """Whether all of them are a Stillhouse."""
        return all(upstream.traits.is_ours for upstream in self.members if upstream.traits)

    @property
    def context_length(self) -> int | None:
        """Of the shortest."""
        lengths = [upstream.traits.context_length for upstream in self.members if upstream.traits]
        known = [length for length in lengths if length is not None]
        return min(known) if known else None

    def load(self) -> Load:
        """How busy they are."""
        return Load(sum(upstream.running for upstream in self.members), self._waiting, 0, 0)

    # What they are asked

    async def stream(self, requests: Sequence[UpstreamRequest]) -> AsyncGenerator[Token, None]:
        """Yield the tokens of all requests, mixed, as they come; ends with the last reply. Leaving early cancels."""
        if self._closing:
            raise BackendFailed("the server is shutting down")
        arrived: asyncio.Queue[Item] = asyncio.Queue(maxsize=256)  # a client that does not read stops its upstream
        tasks = [asyncio.create_task(self._relay(request, arrived)) for request in requests]
        for task in tasks:
            self._relaying.add(task)
            task.add_done_callback(self._relaying.discard)
        pending = len(tasks)
        try:
            while pending:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                pending -= item.finish is not None
                yield item
        finally:
            # Nobody waits for their end: whoever is cancelled here is so at every `await`, and would cancel them again
            # and again while they hang up.
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """End everything. From any thread; nothing may be asked after it."""
        self._closing = True
        if self._loop and self._loop.is_running():
            ended = threading.Event()
            self._loop.call_soon_threadsafe(self._end, ended)
            ended.wait(5)

    def _end(self, ended: threading.Event) -> None:
        for task in [*self._relaying, *([self._checking] if self._checking else [])]:
            task.cancel()
        ended.set()

    async def _relay(self, request: UpstreamRequest, arrived: asyncio.Queue[Item]) -> None:
        try:
            began = time.monotonic()
            async with self._place(), aclosing(self._tokens(request, time.monotonic() - began)) as tokens:
                async for token in tokens:
                    await arrived.put(token)
        except asyncio.CancelledError:
            if not self._closing:
                raise
            with suppress(asyncio.QueueFull):
                arrived.put_nowait(BackendFailed("the server is shutting down"))
        except Exception as error:
            await arrived.put(error)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places for replies in progress; waits for one, in order."""
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()

    async def _tokens(self, request: UpstreamRequest, queue_s: float) -> AsyncGenerator[Token, None]:
        """The reply of the first upstream that gives one."""
        tried: set[Upstream] = set()
        trouble = UpstreamFailed("no upstream is up", status=503)
        while upstream := self._choose(request, tried):
            begun = False
            upstream.running += 1
            upstream.replies += 1
            try:
                async with aclosing(Relay(upstream, request, queue_s).tokens()) as tokens:
                    async for token in tokens:
                        begun = True
                        yield token
                return
            except UpstreamFailed as error:
                upstream.failures += 1
                if error.is_down:
                    upstream.trouble = error.message
                    self._check_now.set()
                if begun or not error.elsewhere:
                    raise
                trouble = error
                tried.add(upstream)
            finally:
                upstream.running -= 1
        raise trouble

    def _choose(self, request: UpstreamRequest, tried: Iterable[Upstream]) -> Upstream | None:
        """Where most of the prompt was read before, among those that are not much busier than the least busy."""
        able = [upstream for upstream in self.up if upstream not in tried]
        if not able:
            return None
        known = dict.fromkeys(able, 0)
        for beginning, length in request.prefix:
            known.update((upstream, length) for upstream in self._read.get(beginning, ()) if upstream in known)
        least = min(upstream.running for upstream in able)
        free = [it for it in able if it.running <= least + min(_BUSIER, known[it] // _WORTH)]
        chosen = max(free, key=lambda upstream: (known[upstream], -upstream.running, -upstream.replies))
        for beginning, _ in request.prefix:
            self._read.setdefault(beginning, set()).add(chosen)
            self._read.move_to_end(beginning)
        while len(self._read) > _REMEMBERED:
            self._read.popitem(last=False)
        return chosen

    async def _check_for_ever(self) -> None:
        while True:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._check_now.wait(), _CHECK_EVERY_S)
            self._check_now.clear()
            for error in await asyncio.gather(*(it.check() for it in self.members), return_exceptions=True):
                if error is not None:
                    log.error("looking after the upstreams failed", exc_info=error)


def beginnings(parts: Iterable[str]) -> list[tuple[bytes, int]]:
    """A prompt's beginnings, one for each of its parts: (hash, characters)."""
    found: list[tuple[bytes, int]] = []
    digest, length = hashlib.blake2b(digest_size=16), 0
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode(errors="surrogatepass"))
        length += len(part)
        found.append((digest.digest(), length))
    return found


def blocks(text: str) -> list[str]:
    """A raw text in the pieces whose beginnings are remembered."""
    return [text[at : at + _BLOCK] for at in range(0, len(text) - _BLOCK + 1, _BLOCK)]
