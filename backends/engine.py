"""The one loop: a thread that owns a backend, `stream` for asyncio and `generate` for everybody else.

A bad request hurts its caller only. A failing step is told to everyone who was in it, and the loop lives on. Knows
nothing of HTTP or of text.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from .base import Backend, BackendFailed, GenerationRequest, Load, Token

_MOST_READ = 16  # prompts that wait to be read for nobody: under load there is no time for more

Item = Token | Exception
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Mailbox:
    """Where tokens go, and on which event loop (none: any thread takes them)."""

    put: Callable[[Item], None]
    loop: asyncio.AbstractEventLoop | None = None


@dataclass(slots=True)
class Activity:
    """What the loop has been doing; written by its thread, read by anyone."""

    steps: int = 0
    step_s: float = 0.0  # in all steps together
    last_step_at: float = field(default_factory=time.monotonic)
    step_began_at: float | None = None  # `None` between two steps

    @property
    def stuck_s(self) -> float:
        """How long the step in progress has taken so far, in seconds; 0 between two."""
        began_at = self.step_began_at
        return 0.0 if began_at is None else time.monotonic() - began_at


class Engine:
    """Runs a backend in a thread of its own, from now until `close`."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.activity = Activity()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}  # of the requests in the backend; touched by the thread only
        self._nobody = _Mailbox(lambda _: None)
        self._closing = False
        self._door = threading.Lock()  # whoever came in before it closed is heard
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Token, None]:
        """Yield the tokens of all requests, mixed, as they come; ends with the last reply. Leaving early cancels.

        Raises what the backend raises for one of them, and `BackendFailed` where a step failed under it.
        """
        arrived: asyncio.Queue[Item] = asyncio.Queue()
        pending = self._send(requests, _Mailbox(arrived.put_nowait, asyncio.get_running_loop()))
        try:
            while pending:
                yield _open(await arrived.get(), pending)
        finally:
            self._recall(pending)

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Token]:
        """As `stream`, for callers without an event loop."""
        arrived: queue.SimpleQueue[Item] = queue.SimpleQueue()
        pending = self._send(requests, _Mailbox(arrived.put))
        try:
            while pending:
                yield _open(arrived.get(), pending)
        finally:
            self._recall(pending)

    def read(self, request: GenerationRequest) -> None:
        """Have a prompt read into the KV cache; nobody waits for it, and it is left out where many are to be read."""
        self._inbox.put(lambda: self._read(request))

    def between_steps(self, job: Callable[[Backend], Result]) -> Result:
        """Have the engine's thread do something with its backend, and wait for it. Raises what the job raises."""
        done: queue.SimpleQueue[tuple[Result | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((job(self.backend), None))
            except Exception as error:
                done.put((None, error))

        with self._door:
            if self._closing:
                raise BackendFailed("the server is shutting down")
            self._inbox.put(run)
        result, error = done.get()
        if error:
            raise error
        return result  # pyright: ignore[reportReturnType] - where there is no error

    def load(self) -> Load:
        """How busy it is now; from any thread."""
        return self.backend.load()

    def close(self) -> None:
        """Finish the step in progress, end everything else, and give the backend back."""
        with self._door:
            if not self._closing:
                self._closing = True
                self._inbox.put(None)
        self._thread.join()

    def _send(self, requests: Sequence[GenerationRequest], mailbox: _Mailbox) -> set[str]:
        with self._door:
            if self._closing:
                raise BackendFailed("the server is shutting down")
            # In one go: what a step begins with does not depend on how fast they come.
            self._inbox.put(lambda: self._add_all(requests, mailbox))
        return {request.id for request in requests}

    def _recall(self, request_ids: set[str]) -> None:
        for request_id in request_ids:
            self._inbox.put(lambda request_id=request_id: self._cancel(request_id))

    # In the thread

    def _run(self) -> None:
        while self._take():
            try:
                started = time.perf_counter()
                self.activity.step_began_at = time.monotonic()
                tokens = self.backend.step()
                self.activity.step_s += time.perf_counter() - started
            except Exception as error:  # out of memory, say: the batch is lost, the engine is not
                self._lose_all(error)
                continue
            finally:
                self.activity.step_began_at = None
            self.activity.steps += 1
            self.activity.last_step_at = time.monotonic()
            self._deliver(tokens)
        self._lose_all(BackendFailed("the server is shutting down"))
        self.backend.close()

    def _take(self) -> bool:
        """Do what the inbox asks for. Wait for work only when idle: a running batch must not stand still."""
        while not self._mailboxes or not self._inbox.empty():
            job = self._inbox.get()
            if job is None:
                return False
            job()
        return True

    def _add_all(self, requests: Sequence[GenerationRequest], mailbox: _Mailbox) -> None:
        for request in requests:
            self._add(request, mailbox)

    def _add(self, request: GenerationRequest, mailbox: _Mailbox) -> None:
        try:
            self.backend.add(request)
        except Exception as error:
            _post({mailbox.loop: [(mailbox, error)]})
        else:
            self._mailboxes[request.id] = mailbox

    def _read(self, request: GenerationRequest) -> None:
        if sum(mailbox is self._nobody for mailbox in self._mailboxes.values()) < _MOST_READ:
            self._add(request, self._nobody)

    def _cancel(self, request_id: str) -> None:
        if self._mailboxes.pop(request_id, None):
            self.backend.cancel(request_id)

    def _deliver(self, tokens: list[Token]) -> None:
        mail: dict[asyncio.AbstractEventLoop | None, list[tuple[_Mailbox, Item]]] = {}
        for token in tokens:
            mailbox = self._mailboxes.get(token.request_id)
            if mailbox is None:  # a backend that goes on after a finish hurts nobody
                continue
            if token.finish:
                del self._mailboxes[token.request_id]
            mail.setdefault(mailbox.loop, []).append((mailbox, token))
        _post(mail)

    def _lose_all(self, error: Exception) -> None:
        mailboxes, self._mailboxes = self._mailboxes, {}
        for request_id, mailbox in mailboxes.items():
            with suppress(Exception):  # it has failed already; what matters is that its callers hear of it
                self.backend.cancel(request_id)
            _post({mailbox.loop: [(mailbox, error)]})


def _open(item: Item, pending: set[str]) -> Token:
    if isinstance(item, Exception):
        raise item
    if item.finish:
        pending.discard(item.request_id)
    return item


def _post(mail: dict[asyncio.AbstractEventLoop | None, list[tuple[_Mailbox, Item]]]) -> None:
    """Hand a step's tokens over: one wake-up for each event loop, however many replies it waits for."""
    for loop, letters in mail.items():
        if loop is None:
            _drop(letters)
        else:
            with suppress(RuntimeError):  # that loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(_drop, letters)


def _drop(letters: list[tuple[_Mailbox, Item]]) -> None:
    for mailbox, item in letters:
        mailbox.put(item)
