"""Who waits and who runs, in the order they came, and what a step carries of whom: the same for every backend.

A prompt, a forced run of tokens and a reply that lost its place are all the same thing here: tokens that are known and
not yet decoded (`todo`). It knows nothing of caches and runtimes: a backend tells what is found and whether there is
room.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from .draft import Draft
from .kvcache import common_prefix
from .pace import Pace

_WORTH_WAITING = 16  # tokens: a prompt waits for another that is being read if it can then copy so many more


class Reply(Protocol):
    """A request that waits or runs."""

    draft: Draft
    todo: array[int]  # known and not yet decoded

    @property
    def known(self) -> array[int]:
        """Every token that is known: decoded and to be decoded."""
        ...


R = TypeVar("R", bound=Reply)


class Line(Generic[R]):
    """The requests of one backend."""

    def __init__(self, parallel: int) -> None:
        self.waiting: deque[R] = deque()
        self.idle: deque[R] = deque()  # work for when nothing else is to do
        self.running: list[R] = []  # in the order they came
        self.parallel = parallel
        self._crowded = False  # a reply had to give its place up: none comes in before one has gone

    def __iter__(self) -> Iterator[R]:
        return iter([*self.running, *self.waiting, *self.idle])

    def add(self, reply: R) -> None:
        """Queue a request."""
        self._queue(reply).append(reply)

    def find(self, request_id: str) -> R | None:
        """The request of an id, wherever it is."""
        return next((reply for reply in self if reply.draft.request.id == request_id), None)

    def leave(self, reply: R) -> None:
        """Take a request out, wherever it is."""
        if reply in self.running:
            self.running.remove(reply)
            self._crowded = False
        else:
            self._queue(reply).remove(reply)

    def clear(self) -> None:
        """Forget everybody."""
        self.waiting, self.idle, self.running = deque(), deque(), []

    def park(self) -> list[R]:
        """Where requests wait, send idle work that runs back to its queue, all of it to be decoded; who that is."""
        parked = [reply for reply in self.running if reply.draft.request.idle] if self.waiting else []
        for reply in parked:
            self.leave(reply)
            reply.todo = reply.known
            self.idle.append(reply)
        return parked

    def give_way(self) -> R:
        """Send the youngest reply back to the front of its queue, all of it to be decoded; who that is."""
        reply = self.running.pop()
        reply.todo = reply.known
        self._queue(reply).appendleft(reply)
        self._crowded = True
        return reply

    def admit(self, found: Callable[[array[int]], int], begin: Callable[[R], bool]) -> None:
        """Let requests in, in order: `begin` says whether there was room. `found` tokens of a prompt need no decoding.

        One whose prompt begins like one that is being read now waits for it, if that saves enough.
        """
        if self._crowded and self.running:
            return
        self._crowded = False
        queue = self.waiting or (self.idle if not self.running else deque())
        kept: deque[R] = deque()
        while queue and len(self.running) < self.parallel:
            reply = queue.popleft()
            soon = self._soon(reply)
            if soon >= _WORTH_WAITING and soon >= found(reply.todo) + _WORTH_WAITING:
                kept.append(reply)
                continue
            if not begin(reply):
                kept.append(reply)
                break
            self.running.append(reply)
        queue.extendleft(reversed(kept))

    def shares(self, size: int, pace: Pace) -> dict[R, int]:
        """How many known tokens of whom the next step decodes, `size` at most.

        Replies first, so that a long prompt cannot hold them up; then prompts, in the order they came.
        """
        counts = {reply: 1 for reply in self.running if len(reply.todo) == 1}
        room = min(size - len(counts), pace.chunk(replying=bool(counts)))
        for reply in self.running:
            if len(reply.todo) > 1 and room:
                counts[reply] = min(len(reply.todo), room)
                room -= counts[reply]
        return counts

    def _soon(self, reply: R) -> int:
        """The longest prefix that a prompt being read now will leave in the cache for this one."""
        being_read = (other for other in self.running if len(other.todo) > 1)
        return max((common_prefix(other.known, reply.todo) for other in being_read), default=0)

    def _queue(self, reply: R) -> deque[R]:
        return self.idle if reply.draft.request.idle else self.waiting
