"""The head's side of its nodes: starts them, lets them in, hears of them, and finds out who is gone.

One door lets in nodes and ranks alike. What comes of a node is told to whoever orders ranks of it (`Group`), and its
ranks' wires are handed over to whoever waits for them. It knows nothing of models.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..r1.errors import UserError
from .cluster_host import EQUAL
from .cluster_hosts import Host
from .cluster_node import BEAT_S
from .cluster_wire import Door, Wire, WireBroken

_SILENT_S = 4.0  # a node that says nothing for so long is lost; it speaks once a second
_RESTART_S = 2.0  # between two starts of a node that ends
_HANGS_S = 10.0  # without a word: a node of this machine hangs
_GONE_S = 60.0  # and what was started by ssh has ended by itself, whatever ssh says
_END_S = 6.0  # that nodes have to end their ranks and themselves

Listener = Callable[[dict[str, Any]], None]


@dataclass(slots=True, eq=False)
class Node:
    """One place of the cluster: a host, and the agent there when it is connected."""

    place: int
    host: Host
    wire: Wire | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    heard_at: float = 0.0
    process: subprocess.Popen[bytes] | None = None  # that started it: ssh, or the agent itself
    started_at: float = float("-inf")
    last_line: str = ""  # that it said on stderr
    listeners: list[Listener] = field(default_factory=list)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The host, as the user wrote it."""
        return self.host.name

    @property
    def trouble(self) -> str | None:
        """Why nothing can be ordered of it; `None` where something can."""
        if self.wire is None:
            return f"host {self.name} is not connected" + (f": {self.last_line}" if self.last_line else "")
        return None


class Nodes:
    """All nodes of one head."""

    def __init__(
        self,
        hosts: Sequence[Host],
        door: Door,
        key: bytes,
        *,
        ssh: Sequence[str],
        remote: Sequence[str] = ("stillhouse",),
        local: Sequence[str] = (sys.executable, "-m", "stillhouse"),
        agents: bool = False,
    ) -> None:
        self.nodes = [Node(place, host) for place, host in enumerate(hosts)]
        self.door = door
        self.changed = threading.Condition()
        self._key, self._ssh, self._remote, self._local, self._agents = key, ssh, remote, local, agents
        self._epochs = itertools.count(1)
        self._questions = itertools.count(1)
        self._ranks: dict[tuple[int, int], Wire | None] = {}  # epoch, rank -> its wire, once it has come
        self._closed = False
        self._threads = [
            threading.Thread(target=self._let_in, name="nodes", daemon=True),
            threading.Thread(target=self._look_after, name="nodes-alive", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # Nodes

    def wait(self, timeout_s: float) -> None:
        """Wait until all nodes are there. Raises `UserError` with those that are not."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while missing := [node for node in self.nodes if node.wire is None]:
                self._check()
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise UserError("; ".join(node.trouble or "" for node in missing), self.way_in(missing[0]))
                self.changed.wait(min(left_s, 0.5))

    def check_versions(self) -> None:
        """Raise `UserError` where hosts have different versions of what must be equal."""
        for package in EQUAL:
            found: dict[str, list[str]] = {}
            for node in self.nodes:
                if node.hello:  # has come
                    found.setdefault(node.hello.get("versions", {}).get(package) or "none", []).append(node.name)
            if len(found) > 1:
                told = ", ".join(f"{version} on {' and '.join(names)}" for version, names in sorted(found.items()))
                raise UserError(
                    f"the hosts have different versions of {package}: {told}",
                    f"install one version everywhere: pip install {package}=={max(found)}",
                )

    def send(self, node: Node, message: dict[str, Any]) -> None:
        """Tell a node something. Raises `WireBroken` where it is gone."""
        wire = node.wire
        if wire is None:
            raise WireBroken(node.trouble or f"host {node.name} is gone")
        wire.send(message)

    def ask(self, node: Node, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """What a node answers. Raises `UserError`, also with what the node found wrong."""
        number = next(self._questions)
        self.send(node, {**question, "ask": number})
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while number not in node.answers:
                self._check()
                left_s = deadline - time.monotonic()
                if left_s <= 0 or node.wire is None:
                    raise UserError(node.trouble or f"host {node.name} does not answer")
                self.changed.wait(min(left_s, 0.5))
            told = node.answers.pop(number)
        if told.get("error"):
            raise UserError(f"host {node.name}: {told['error']}", told.get("hint"))
        return told

    # Ranks

    def next_epoch(self, size: int) -> int:
        """A new epoch, whose ranks are let in from now on."""
        epoch = next(self._epochs)
        with self.changed:
            self._ranks.update({(epoch, rank): None for rank in range(size)})
        return epoch

    def ranks(self, epoch: int) -> list[Wire | None]:
        """The wires of an epoch's ranks, in order, `None` for those that have not come."""
        with self.changed:
            return [wire for (of, _), wire in sorted(self._ranks.items()) if of == epoch]

    def forget(self, epoch: int) -> None:
        """Let no rank of this epoch in, and hang up on those that are."""
        with self.changed:
            gone = [self._ranks.pop(key) for key in list(self._ranks) if key[0] == epoch]
        for wire in gone:
            if wire:
                wire.close()

    # The end

    def close(self) -> None:
        """End all nodes and with them their ranks; wait until they have."""
        with self.changed:
            if self._closed:
                return
            self._closed = True
            self.changed.notify_all()
        for node in self.nodes:
            if node.process and not node.hello:
                node.process.kill()  # an ssh that waits for a host that does not answer
            with contextlib.suppress(WireBroken):
                if self._agents:  # they belong to launchd, and wait for the next head
                    self.send(node, {"stop": None})
                else:
                    self.send(node, {"end": True})
        deadline = time.monotonic() + _END_S
        for node in self.nodes:
            if node.process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.process.wait(max(0.0, deadline - time.monotonic()))
        for node in self.nodes:
            if node.process and node.process.poll() is None:
                node.process.kill()
                node.process.wait()
            if node.wire:
                node.wire.close()
        self.door.close()

    # In threads

    def _let_in(self) -> None:
        while not self._closed:
            try:
                wire = self.door.accept(0.5)
            except TimeoutError:
                continue
            if self._closed or not self._welcome(wire):
                wire.close()

    def _welcome(self, wire: Wire) -> bool:
        """Put a wire where it is waited for; whether it is."""
        hello = wire.hello
        with self.changed:
            if hello.get("role") == "rank":
                match hello:
                    case {"epoch": int(epoch), "rank": int(rank)} if self._ranks.get((epoch, rank), wire) is None:
                        self._ranks[epoch, rank] = wire
                    case _:  # no such seat, or taken
                        return False
            elif hello.get("role") == "node" and (node := self._node_of(hello)):
                if node.wire:  # the same host again: the link was cut, and the old wire does not know it yet
                    self._dismiss(node.wire)
                node.wire, node.hello, node.heard_at, node.last_line = wire, hello, time.monotonic(), ""
                threading.Thread(target=self._hear, args=(node, wire), name="node", daemon=True).start()
            else:
                return False
            self.changed.notify_all()
        return True

    def _dismiss(self, wire: Wire) -> None:
        """Hang up on a node whose place is taken; where it still hears us, it is one too many."""
        if not self._agents:
            with contextlib.suppress(WireBroken):
                wire.send({"end": True})
        wire.close()

    def _node_of(self, hello: dict[str, Any]) -> Node | None:
        place = hello.get("place")
        if isinstance(place, int) and 0 <= place < len(self.nodes):
            return self.nodes[place]
        free = [node for node in self.nodes if node.host.answers_to(str(hello.get("name")))]
        return next((node for node in free if node.wire is None), free[0] if free else None)

    def _hear(self, node: Node, wire: Wire) -> None:
        with contextlib.suppress(WireBroken):
            while True:
                message, _ = wire.receive(None)
                node.heard_at = time.monotonic()
                if isinstance(number := message.get("answer"), int):
                    with self.changed:
                        node.answers[number] = message
                        self.changed.notify_all()
                for listener in list(node.listeners):
                    listener(message)
        with self.changed:
            if node.wire is wire:
                node.wire = None
            self.changed.notify_all()
        for listener in list(node.listeners):
            listener({"gone": True})

    def _look_after(self) -> None:
        """Once in a while: start nodes that are not there, speak to those that are, give up those that are silent."""
        while not self._closed:
            for node in self.nodes:
                wire = node.wire
                if wire is not None and time.monotonic() - node.heard_at > _SILENT_S:
                    node.last_line = f"nothing heard of it for {_SILENT_S:g} s"
                    wire.close()
                elif wire is not None:
                    threading.Thread(target=_speak, args=(wire,), daemon=True).start()
                elif not self._agents:
                    self._start(node)
            with self.changed:
                if not self._closed:
                    self.changed.wait(BEAT_S / 2)

    def _start(self, node: Node) -> None:
        ended = node.process is None or node.process.poll() is not None
        if node.process and not ended:
            away_s = time.monotonic() - max(node.heard_at, node.started_at)
            if away_s > (_HANGS_S if node.host.is_local else _GONE_S):
                node.process.kill()  # stopped, or an ssh whose other end is no more
        if not ended or time.monotonic() - node.started_at < _RESTART_S or self._closed:
            return
        node.started_at = time.monotonic()
        host, port = self.door.address
        order = ["cluster", "node", "--join", f"{host}:{port}", "--place", str(node.place)]
        if node.host.is_local:
            command = [*self._local, *order]
        else:
            command = [*self._ssh, node.host.ssh, shlex.join([*self._remote, *order])]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the head: it ends its nodes in order
            )
        except OSError as error:
            node.last_line = f"{command[0]}: {error.strerror or error}"
            return
        node.process = process
        threading.Thread(target=self._read, args=(node, process), name="node-stderr", daemon=True).start()
        assert process.stdin
        with contextlib.suppress(OSError):
            process.stdin.write(self._key.hex().encode() + b"\n")
            process.stdin.close()

    def _read(self, node: Node, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr
        for line in process.stderr:
            text = line.decode(errors="replace").rstrip()
            node.last_line = text[-300:] or node.last_line
            print(f"{node.name}: {text}", file=sys.stderr, flush=True)
        process.wait()
        process.stderr.close()

    def _check(self) -> None:
        if self._closed:
            raise UserError("the cluster is being stopped")

    def way_in(self, node: Node) -> str:
        """What to try where a node does not come."""
        if self._agents:
            host, port = self.door.address
            return f"is `stillhouse cluster node --join {host}:{port} --key-file FILE` running there?"
        if node.host.is_local:
            return "its own words are above"
        return f"can you `{shlex.join([*self._ssh, node.host.ssh])} {shlex.join(self._remote)} --version`?"


def _speak(wire: Wire) -> None:
    with contextlib.suppress(WireBroken):
        wire.send({"alive": time.time()})
