"""One group of ranks that hold one copy of a model together: started, watched, ended, and started anew.

A thread does it. It never believes a process that only lives: the group is up while a collective step of all its ranks
came to its end lately, and idle ranks are made to do one every second. What a request loses on a failure, and what a
client is told, is not known here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..r1.errors import UserError
from .base import BackendFailed, LoadOptions
from .cluster_nodes import Node, Nodes
from .cluster_ranks import Ranks
from .cluster_wire import Wire, WireBroken

BEAT_EVERY_S = 1.0
_STALE_S = 10.0  # without a collective step: not ready, whatever else is said
_CONNECT_S = 60.0  # that ranks have to start in
_JOIN_S = 6.0  # that they have to find one another; a stranger on a ring's port makes them wait for ever
_END_S = 5.0  # that ranks have to end in
_PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # between two starts
_CALM_S = 5.0  # up for so long: the next failure is a first one
_FIRST_TRIES = 4
_STOPPED = "the cluster is being stopped"
_PORTS = range(20_000, 32_000)  # below those that systems give to clients

Strategy = Literal["tensor", "pipeline", "single"]
Transport = Literal["ring", "jaccl", "jaccl-ring"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What a group's ranks load."""

    strategy: Strategy
    transport: Transport
    folders: Sequence[str]  # of the model, on each rank's host
    options: LoadOptions
    ready_s: float = 600.0  # that loading may take


class Group:
    """Keeps one group of ranks up until `close`."""

    def __init__(self, number: int, nodes: Nodes, members: Sequence[Node], shard: Shard) -> None:
        self.number = number
        self.epoch = 0
        self.restarts = 0
        self.state: Literal["starting", "up", "down"] = "starting"
        self._reason = "the ranks are being started"  # why it is not up
        self._nodes, self._members, self._shard = nodes, list(members), shard
        self._ranks: Ranks | None = None  # the last that were up
        self._exited: dict[int, str] = {}  # rank -> how it ended, in the epoch
        self._codes: dict[int, int] = {}
        self._given: Ranks | None = None  # with what the backend was made
        self._hopeless: UserError | None = None  # why it could not start at all
        self._renew: Callable[[Ranks], None] | None = None
        self._changed = threading.Condition()
        self._closed = threading.Event()
        for rank, node in enumerate(self._members):
            node.listeners.append(lambda message, rank=rank: self._heard(rank, message))
        self._thread = threading.Thread(target=self._run, name=f"group-{number}", daemon=True)

    def start(self) -> Ranks:
        """Start the ranks for the first time. Raises `UserError` where that cannot be."""
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ranks or self._hopeless or self._closed.is_set())
            if self._hopeless:
                raise self._hopeless
            if self._ranks is None:
                raise UserError(_STOPPED)
            self._given = self._ranks
            # Whoever schedules requests has reckoned with these by now.
            options = dataclasses.replace(
                self._shard.options, context=self._given.context_length, cache_tokens=self._given.cache_tokens
            )
            self._shard = dataclasses.replace(self._shard, options=options)
            return self._given

    def attach(self, renew: Callable[[Ranks], None]) -> None:
        """Take over: from now on it is looked after. `renew` has the backend go on with other ranks."""
        with self._changed:
            self._renew = renew
            self._changed.notify_all()

    @property
    def trouble(self) -> str | None:
        """Why no request can be taken now, `None` where one can."""
        ranks = self._ranks
        if self.state != "up" or ranks is None:
            return self._reason
        age_s = time.monotonic() - ranks.last_step_at
        return ranks.trouble or (f"no collective step for {age_s:.0f} s" if age_s > _STALE_S else None)

    def table(self) -> dict[str, Any]:
        """What is known of it, as JSON."""
        ranks, trouble = self._ranks, self.trouble
        told = {entry["rank"]: entry for entry in (ranks.table() if ranks else ())}
        return {
            "group": self.number,
            "state": "up" if trouble is None else "starting" if self.state == "starting" else "down",
            "reason": trouble,
            "epoch": self.epoch,
            "restarts": self.restarts,
            "strategy": self._shard.strategy,
            "backend": self._shard.transport,
            "last_step_age_s": None if ranks is None else round(time.monotonic() - ranks.last_step_at, 3),
            "ranks": [self._row(rank, node, told.get(rank, {}), trouble) for rank, node in enumerate(self._members)],
        }

    def close(self) -> None:
        """End the ranks, for good."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_END_S + 5)

    # In its thread

    def _run(self) -> None:
        failures = 0
        while not self._closed.is_set():
            up_at = math.inf
            try:
                ranks = self._start()
                self._take(ranks)
                up_at = time.monotonic()
                reason = self._watch(ranks)
            except (UserError, OSError) as error:
                known = error if isinstance(error, UserError) else UserError(f"the ranks cannot be started: {error}")
                reason = known.message
                if self._gives_up(known, failures):
                    return
            self._end(reason)
            failures = 1 if time.monotonic() - up_at > _CALM_S else failures + 1
            if not self._closed.is_set():
                self.restarts += 1
            self._closed.wait(_PAUSES_S[min(failures - 1, len(_PAUSES_S) - 1)])

    def _gives_up(self, error: UserError, failures: int) -> bool:
        """Whether the first start has failed for good: what a rank refuses by name, it will refuse again."""
        refused = not isinstance(error, (BackendFailed, WireBroken, _Late))
        if self._given or (failures + 1 < _FIRST_TRIES and not refused):
            return False
        self._end(error.message)
        with self._changed:
            self._hopeless = error
            self._changed.notify_all()
        return True

    def _start(self) -> Ranks:
        """Start an epoch: order its ranks, wait until they have found one another and have loaded."""
        while lost := [node for node in self._members if node.wire is None]:
            self._reason = "; ".join(node.trouble or "" for node in lost)
            if self._closed.is_set():
                raise UserError(_STOPPED)
            with self._nodes.changed:
                self._nodes.changed.wait(0.5)
        self._nodes.check_versions()
        self._exited = {}
        self.epoch = self._nodes.next_epoch(len(self._members))
        for node, order in zip(self._members, orders(self._members, self._shard, self.epoch), strict=True):
            self._nodes.send(node, {"start": order})
        wires = self._connected()
        self._hear(wires, "here", _CONNECT_S, "has not loaded MLX")
        for wire in wires:  # all at once: who comes late lets strangers in, and neighbours wait 1, 2, 4 s
            wire.send({"go": True})
        self._hear(wires, "joined", _JOIN_S, "has not found its neighbours (a stranger on its port, or a firewall)")
        ready = self._hear(wires, "ready", self._shard.ready_s, "has not loaded the model")
        return Ranks(wires, epoch=self.epoch, ready=ready)

    def _connected(self) -> list[Wire]:
        """The wires of the ranks, in order, when all have come."""
        deadline = time.monotonic() + _CONNECT_S
        while True:
            wires = self._nodes.ranks(self.epoch)
            if all(wires):
                return [wire for wire in wires if wire]
            rank = wires.index(None)
            try:
                self._check(deadline, f"rank {rank} on {self._members[rank].name} has not started in {_CONNECT_S:g} s")
            except UserError:
                self._tell(wires)
                raise
            with self._nodes.changed:
                self._nodes.changed.wait(0.05)

    def _hear(self, wires: Sequence[Wire], word: str, limit_s: float, otherwise: str) -> list[dict[str, Any]]:
        """Wait until every rank has said a word; what it said with it."""
        deadline = time.monotonic() + limit_s
        said: list[dict[str, Any]] = []
        for rank, wire in enumerate(wires):
            who = f"rank {rank} on {self._members[rank].name}"
            while len(said) == rank:
                try:
                    self._check(deadline, f"{who} {otherwise} in {limit_s:g} s")
                    message, _ = wire.receive(0.1)
                except TimeoutError:
                    continue
                except WireBroken:
                    self._closed.wait(0.3)  # how it ended is known to its node, and tells more
                    self._tell(wires)
                    self._check(deadline, otherwise)
                    raise
                except UserError:
                    self._tell(wires)
                    raise
                self._refuse(rank, message)
                if message.get(word):
                    said.append(message)
        return said

    def _tell(self, wires: Sequence[Wire | None]) -> None:
        """Raise what a rank said before it ended: the others end of it, and know less."""
        for rank, wire in enumerate(wires):
            with contextlib.suppress(TimeoutError, WireBroken):
                while wire:
                    self._refuse(rank, wire.receive(0.02)[0])

    def _refuse(self, rank: int, message: Mapping[str, Any]) -> None:
        if message.get("error"):
            kind = UserError if message.get("user") else _Late
            raise kind(f"rank {rank} on {self._members[rank].name}: {message['error']}", message.get("hint"))

    def _check(self, deadline: float = math.inf, otherwise: str = "") -> None:
        """Raise `UserError` where the cluster is being stopped, or this epoch has failed or had its time."""
        if self._closed.is_set():
            raise UserError(_STOPPED)
        for rank, words in sorted(self._exited.items()):
            kind = UserError if self._codes[rank] == UserError.exit_code else _Late
            raise kind(f"rank {rank} on {self._members[rank].name} {words}")
        if self.epoch:
            for node in self._members:
                if node.wire is None:
                    raise _Late(node.trouble or f"host {node.name} is gone")
        if time.monotonic() > deadline:
            raise _Late(otherwise)

    def _take(self, ranks: Ranks) -> None:
        """Have the backend go on with these ranks; at the first time, wait for it to be made."""
        with self._changed:
            self._ranks = ranks
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._renew or self._closed.is_set())
        if self._renew and self._given is not ranks:
            self._renew(ranks)
        self.state, self._reason = "up", ""

    def _watch(self, ranks: Ranks) -> str:
        """Have idle ranks beat, until something is wrong; what."""
        while not self._closed.wait(0.1):
            if ranks.trouble:
                return ranks.trouble
            if time.monotonic() - ranks.last_step_at > BEAT_EVERY_S:
                with contextlib.suppress(BackendFailed):  # `trouble` says it
                    ranks.beat()
        return _STOPPED

    def _end(self, reason: str) -> None:
        """End what is left of an epoch, whatever state it is in."""
        self.state, self._reason = "down", reason
        if self._ranks:
            self._ranks.close()
        for node in self._members:
            with contextlib.suppress(WireBroken):
                self._nodes.send(node, {"stop": self.epoch})
        deadline = time.monotonic() + _END_S
        while self.epoch and time.monotonic() < deadline:
            if not [rank for rank, node in enumerate(self._members) if node.wire and rank not in self._exited]:
                break
            time.sleep(0.02)
        self._nodes.forget(self.epoch)

    # In a node's thread

    def _heard(self, rank: int, message: Mapping[str, Any]) -> None:
        words = ""
        if message.get("gone"):
            words = f"host {self._members[rank].name} is gone"
        elif "exited" in message and message.get("epoch") == self.epoch:
            self._codes[rank] = message["exited"]
            how = self._exited[rank] = _ending(message["exited"], message.get("words") or "")
            words = f"rank {rank} on {self._members[rank].name} {how}"
        if words and self._ranks and self.state == "up":
            self._ranks.fail(words)

    def _row(self, rank: int, node: Node, told: Mapping[str, Any], trouble: str | None) -> dict[str, Any]:
        return {
            "rank": rank,
            "host": node.name,
            "address": node.host.address,
            "up": trouble is None and node.wire is not None and rank not in self._exited,
            "node_connected": node.wire is not None,
            "exited": self._exited.get(rank),
            "pid": told.get("pid"),
            "step": told.get("step"),
            "heard_age_s": round(told["heard_s"], 3) if told else None,
            "memory_bytes": told.get("memory_bytes"),
        }


class _Late(UserError):
    """A start that failed for no reason that a user could have told before; another may succeed."""


def orders(members: Sequence[Node], shard: Shard, epoch: int) -> list[dict[str, Any]]:
    """What each node is told to start: environment and files for MLX, and the rank's own line."""
    ports = random.sample(_PORTS, len(members))  # new ones each time: who knew the old ones knows nothing
    ring = json.dumps([[f"{node.host.address}:{port}"] for node, port in zip(members, ports, strict=True)])
    told: list[dict[str, Any]] = []
    for rank, _ in enumerate(members):
        environment = {"MLX_RANK": str(rank)}
        files: dict[str, str] = {}
        if shard.transport == "ring":
            files["MLX_HOSTFILE"] = ring
        else:
            environment["MLX_JACCL_COORDINATOR"] = f"{members[0].host.address}:{ports[0]}"
            files["MLX_IBV_DEVICES"] = json.dumps([list(node.host.rdma) for node in members])
            if shard.transport == "jaccl-ring":
                environment["MLX_JACCL_RING"] = "1"
        spec = {
            "epoch": epoch,
            "rank": rank,
            "size": len(members),
            "strategy": shard.strategy,
            "model": shard.folders[rank],
            "options": _plain(shard.options),
            "ready_s": shard.ready_s,
            "waits": True,
        }
        told.append({"epoch": epoch, "environment": environment, "files": files, "spec": spec})
    return told


def _plain(options: LoadOptions) -> dict[str, Any]:
    """Options as JSON; adapters as paths."""
    told = dataclasses.asdict(options)
    told["loras"] = [[str(path), scale] for path, scale in options.loras]
    return told


def _ending(code: Any, words: str) -> str:
    """How a process ended."""
    how = f"was ended by signal {-code}" if isinstance(code, int) and code < 0 else f"ended with exit code {code}"
    return f"{how}: {words}" if words else how
