"""The ranks of a cluster as one executor: every call of the model is one control message to all of them.

What changes states only (`begin`, `copy`, `join` ...) waits for the next call of the model and goes along with it. All
ranks acknowledge each message; rank 0 answers with the logits. When one fails, all are given up: their states no longer
agree, and whoever started them starts new ones. Knows nothing of requests, nor of how ranks are started.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..r1.errors import UserError
from .base import BackendFailed
from .cluster_wire import Wire, WireBroken

SILENT_S = 2.5  # a rank says twice a second that it lives
_STOP_S = 2.0  # that ranks have to end in when they are told to
_SETTLE_S = 0.2  # in which the others tell what they saw of a failure: who tells nothing is to blame


@dataclass(slots=True, eq=False)
class _Rank:
    number: int
    wire: Wire
    heard_at: float = field(default_factory=time.monotonic)
    memory_bytes: int = 0
    step: int = 0  # the last that it acknowledged
    answer: tuple[dict[str, Any], memoryview] | None = None
    said: str | None = None  # its own words of what went wrong
    gone: str | None = None  # how its wire ended


class Ranks:
    """All ranks of one epoch, in order. One thread calls the executor's methods; any thread the others."""

    name = "the cluster"

    def __init__(
        self,
        wires: Sequence[Wire],
        *,
        epoch: int,
        ready: Sequence[Mapping[str, Any]],
        stall_s: float = 3.0,  # longer than SILENT_S: who stands still is named before those that wait for it
        first_s: float = 30.0,
    ) -> None:
        """`ready` is what each said when it had loaded.

        A step may take `stall_s` longer than four times what any took before; the first of its kind `first_s`.
        """
        self.context_length = min(int(told["context"]) for told in ready)
        self.cache_tokens = min(int(told["cache_tokens"]) for told in ready)
        self.failed = threading.Event()
        self.trouble: str | None = None  # why they were given up
        self.last_step_at = time.monotonic()  # when all ranks last did something together
        self._epoch = epoch
        self._stall_s, self._first_s = stall_s, first_s
        self._slowest_s: dict[str, float] = {}  # a token, by kind of call
        self._step = 0
        self._stopping = False
        self._pending: deque[list[Any]] = deque()
        self._exchanging = threading.Lock()
        self._changed = threading.Condition()
        self._ranks = [_Rank(number, wire) for number, wire in enumerate(wires)]
        for rank, told in zip(self._ranks, ready, strict=True):
            rank.memory_bytes = int(told.get("memory_bytes", 0))
        for rank in self._ranks:
            threading.Thread(target=self._listen, args=(rank,), name=f"rank {rank.number}", daemon=True).start()

    def beat(self) -> None:
        """Have all ranks meet once, unless they are at work. Raises `BackendFailed`."""
        if self._exchanging.acquire(blocking=False):
            try:
                self._call(["beat"])
            finally:
                self._exchanging.release()

    def fail(self, reason: str) -> None:
        """Give all ranks up; who waits for one hears why."""
        self._give_up(reason)

    def table(self) -> list[dict[str, Any]]:
        """Every rank, as far as it is known."""
        now = time.monotonic()
        return [
            {
                "rank": rank.number,
                "peer": rank.wire.peer,
                "pid": rank.wire.hello.get("pid"),
                "heard_s": now - rank.heard_at,
                "step": rank.step,
                "memory_bytes": rank.memory_bytes,
                "trouble": rank.said or rank.gone,
            }
            for rank in self._ranks
        ]

    # The executor

    def begin(self, state: int) -> None:
        """An empty state."""
        self._pending.append(["begin", state])

    def copy(self, state: int, source: int, length: int) -> None:
        """The first `length` tokens of another state."""
        self._pending.append(["copy", state, source, length])

    def drop(self, states: Sequence[int]) -> None:
        """Forget states."""
        self._pending.append(["drop", list(states)])

    def join(self, states: Sequence[int]) -> None:
        """Put states into the rows."""
        self._pending.append(["join", list(states)])

    def part(self, states: Sequence[int]) -> None:
        """Take states out of the rows."""
        self._pending.append(["part", list(states)])

    def read(self, state: int, token_ids: Sequence[int]) -> None:
        """Read tokens into a state that lies alone."""
        with self._exchanging:
            self._call(["read", state, list(token_ids)])

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one token into each row; rank 0's logits of what follows."""
        with self._exchanging:
            told, data = self._call(["step", list(token_ids)])
        try:
            return np.frombuffer(data, np.float32).reshape(told["shape"]).copy()  # on its own, and aligned
        except (KeyError, ValueError, TypeError):
            self._give_up(f"rank 0 answered step {self._step} with {len(data)} bytes that are no logits")
            raise BackendFailed(self.trouble or "") from None

    def clear(self) -> None:
        """Forget all states."""
        self._pending.clear()
        self._pending.append(["clear"])

    def close(self) -> None:
        """Have the ranks end, each by itself: one that is hung up on cannot tell that from a head that died."""
        with self._exchanging:
            if self.trouble is None:
                self._stopping = True
                for rank in self._ranks:
                    with suppress(UserError):
                        rank.wire.send({"epoch": self._epoch, "step": self._step + 1, "ops": [["stop"]]})
                with self._changed:
                    self._changed.wait_for(lambda: all(rank.gone for rank in self._ranks), _STOP_S)
            self._give_up("the cluster was stopped")

    # One message

    def _call(self, op: list[Any]) -> tuple[dict[str, Any], memoryview]:
        """Have all ranks do what is pending and then this; rank 0's answer."""
        if self.trouble is not None:
            raise BackendFailed(self.trouble)
        ops: list[list[Any]] = []
        while self._pending:
            ops.append(self._pending.popleft())
        self._step += 1
        message = {"epoch": self._epoch, "step": self._step, "ops": [*ops, op]}
        kind, tokens = op[0], len(op[-1]) if op[0] == "read" else 1
        started = time.monotonic()
        try:
            for rank in self._ranks:
                rank.wire.send(message)
        except WireBroken:
            pass  # its listener hears of it, too
        except UserError as error:  # too long: nobody has got it
            self._step -= 1
            raise BackendFailed(str(error)) from None
        answer = self._wait(kind, started + self._allowed_s(kind, tokens))
        self.last_step_at = time.monotonic()
        token_s = (self.last_step_at - started) / tokens
        self._slowest_s[kind] = max(token_s, self._slowest_s.get(kind, 0.0))
        return answer

    def _allowed_s(self, kind: str, tokens: int) -> float:
        slowest_s = self._slowest_s.get(kind)
        return self._first_s if slowest_s is None else self._stall_s + 4 * slowest_s * tokens

    def _wait(self, kind: str, deadline: float) -> tuple[dict[str, Any], memoryview]:
        """Rank 0's answer, when all have acknowledged the step; or give them up and raise `BackendFailed`."""
        watched_from = before = time.monotonic()
        with self._changed:
            while any(rank.step < self._step for rank in self._ranks) and self.trouble is None:
                now = time.monotonic()
                if now - before > 1:  # this process itself stood still: nobody can be blamed for that time
                    watched_from, deadline = now, deadline + now - before
                before = now
                late = [rank for rank in self._ranks if rank.step < self._step]
                silent = [rank for rank in late if now - max(rank.heard_at, watched_from) > SILENT_S]
                if silent:
                    self._give_up(f"{_names(silent)} of {len(self._ranks)} said nothing for {SILENT_S:g} s")
                elif now > deadline:
                    self._give_up(f"{_names(late)} of {len(self._ranks)} did not come to the end of a {kind}")
                else:
                    self._changed.wait(min(0.25, max(0.01, deadline - now)))
            if self.trouble is not None:
                raise BackendFailed(self.trouble)
            answer = self._ranks[0].answer
            assert answer is not None
            return answer

    # Failures

    def _listen(self, rank: _Rank) -> None:
        """Hear one rank, until its wire ends; that is the end of all."""
        try:
            while True:
                message, data = rank.wire.receive(None)
                with self._changed:
                    self._hear(rank, message, data)
                    if rank.said is not None:
                        break
        except WireBroken as error:
            with self._changed:
                rank.gone = error.message
                self._changed.notify_all()
            if self._stopping:
                return
        self.failed.wait(_SETTLE_S)
        self._give_up()

    def _hear(self, rank: _Rank, message: dict[str, Any], data: memoryview) -> None:
        rank.heard_at = time.monotonic()
        if "error" in message:
            rank.said = str(message["error"])
        elif "step" in message:
            if (message.get("epoch"), message["step"]) != (self._epoch, self._step):
                rank.said = f"it acknowledged step {message['step']} where step {self._step} was asked"
                return
            rank.step, rank.answer = self._step, (message, data)
            rank.memory_bytes = int(message.get("memory_bytes", 0))
        else:
            return
        self._changed.notify_all()

    def _give_up(self, words: str | None = None) -> None:
        """Fail, in these words or in those that the ranks' ends give, and hang up: whoever still runs ends of it."""
        with self._changed:
            if self.trouble is None:
                self.trouble = words or self._blame()
            self.failed.set()
            self._changed.notify_all()
        for rank in self._ranks:
            rank.wire.close()

    def _blame(self) -> str:
        """A rank that told of a failure saw another one's; one that ended without a word is the first cause."""
        wordless = [rank for rank in self._ranks if rank.gone and not rank.said]
        if wordless:
            return f"{_names(wordless)} of {len(self._ranks)} ended: {wordless[0].gone}"
        told = [rank for rank in self._ranks if rank.said]
        return f"{_names(told[:1])} of {len(self._ranks)} failed: {told[0].said}"


def _names(ranks: Sequence[_Rank]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join(str(rank.number) for rank in ranks)
