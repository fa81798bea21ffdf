"""The agent of one host: starts the rank that the head orders, ends it, and says how it ended. It decides nothing.

It goes to the head and not the other way round, so no host of a cluster listens but the head's. A host that hears
nothing of its head for ten seconds ends its rank and looks for the head again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..r1.errors import UserError
from ..r1.hub import resolve
from . import cluster_probe
from .cluster_host import describe
from .cluster_wire import Door, Wire, WireBroken, connect

BEAT_S = 1.0
_LOST_S = 10.0  # without a word of the head: its rank ends
_GIVE_UP_S = 15.0  # without the head: a node that it started ends
_CONNECT_S = 3.0
_LONGEST_PAUSE_S = 2.0
_TERM_S = 1.0  # that a rank has to end by itself
_RANK = (sys.executable, "-m", "stillhouse.backends.cluster_rank")


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """Where a node belongs."""

    head: tuple[str, int]
    key: bytes
    place: int | None = None  # which of the head's hosts this is, where the head started it
    name: str | None = None  # by which the head knows this host, where it did not; its hostname
    stays: bool = False  # looks for its head for ever
    rank_command: Sequence[str] = _RANK


def run(options: NodeOptions) -> int:
    """Serve the head until it says that it is over, or until a signal does; the exit code."""
    node = _Node(options)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, node.signalled)
    return node.run()


class _Rank:
    """The process of one rank, and a thread that waits for its end."""

    def __init__(self, command: Sequence[str], order: dict[str, Any], spec: dict[str, Any], wire: Wire) -> None:
        self.epoch = order["epoch"]
        self._number = spec.get("rank")
        self._folder = tempfile.TemporaryDirectory(prefix="stillhouse-rank-")
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        for name, value in order.get("environment", {}).items():
            environment[_allowed(name)] = str(value)
        for name, text in order.get("files", {}).items():
            file = Path(self._folder.name, f"{_allowed(name).lower()}.json")
            file.write_text(text)
            environment[name] = str(file)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the head: it ends its ranks in order
        )
        self._last_line = ""
        self._thread = threading.Thread(target=self._wait, args=(wire,), name="rank", daemon=True)
        self._thread.start()
        assert self._process.stdin
        with contextlib.suppress(OSError):  # it has ended already, which is told when it has been waited for
            self._process.stdin.write(json.dumps(spec).encode() + b"\n")
            self._process.stdin.close()

    def end(self) -> None:
        """End it: TERM, and KILL for one that hangs in a driver or was stopped."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            self._thread.join(_TERM_S)
            self._signal(signal.SIGKILL)
        self._thread.join(5)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, of one that has ended
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)

    def _wait(self, wire: Wire) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip()
            if text and text != self._last_line:  # MLX says some things ten times
                self._last_line = text
                _say(f"rank {self._number}: {text}")
        code = self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()
        with contextlib.suppress(WireBroken):
            wire.send({"exited": code, "epoch": self.epoch, "rank": self._number, "words": self._last_line[-400:]})


class _Node:
    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self._rank: _Rank | None = None
        self._wire: Wire | None = None
        self._over = threading.Event()

    def run(self) -> int:
        lost_at, pause_s, told = time.monotonic(), 0.1, ""
        try:
            while not self._over.is_set():
                try:
                    self._wire = connect(*self._options.head, self._options.key, self._hello(), _CONNECT_S)
                except WireBroken as error:
                    if told != error.message:
                        _say(f"{error}; trying again")
                        told = error.message
                    if not self._options.stays and time.monotonic() - lost_at > _GIVE_UP_S:
                        _say(f"no head for {_GIVE_UP_S:g} s")
                        return 1
                    self._over.wait(pause_s)
                    pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)
                    continue
                self._obey(self._wire)
                self._end_rank()
                lost_at, pause_s, told = time.monotonic(), 0.1, ""
        finally:
            self._end_rank()
            if self._wire:
                self._wire.close()
        return 0

    def signalled(self, number: int, frame: FrameType | None) -> None:
        """End, as a signal says."""
        self._over.set()

    def _hello(self) -> dict[str, Any]:
        told = describe()
        name = self._options.name or told["name"]
        return {"role": "node", "place": self._options.place, **told, "name": name}

    def _obey(self, wire: Wire) -> None:
        """Do what the head says, until it is silent, gone, or says that it is over."""
        threading.Thread(target=self._beat, args=(wire,), name="beat", daemon=True).start()
        heard_at = time.monotonic()
        while not self._over.is_set():
            try:
                message, _ = wire.receive(0.2)
            except TimeoutError:
                if time.monotonic() - heard_at > _LOST_S:
                    _say(f"nothing heard of the head for {_LOST_S:g} s")
                    break
                continue
            except WireBroken as error:
                _say(error.message)
                break
            heard_at = time.monotonic()
            self._order(wire, message)
        if not self._over.is_set():
            wire.close()

    def _order(self, wire: Wire, message: dict[str, Any]) -> None:
        match message:
            case {"start": dict(order)}:
                self._end_rank()
                key = {"head": list(self._options.head), "key": self._options.key.hex()}
                try:
                    self._rank = _Rank(self._options.rank_command, order, order["spec"] | key, wire)
                except (OSError, UserError) as error:
                    rank = {"epoch": order.get("epoch"), "rank": order["spec"].get("rank")}
                    wire.send({"exited": 2, **rank, "words": f"it cannot be started: {error}"})
            case {"stop": epoch}:
                if self._rank and epoch in (None, self._rank.epoch):
                    self._end_rank()
            case {"end": _}:
                self._over.set()
            case {"find": str(name)}:
                _aside(wire, message, lambda: _find(name))
            case {"listen": str(host), "key": str(key)}:
                _aside(wire, message, lambda: _listen(host, bytes.fromhex(key)))
            case {"measure": [str(host), int(port)], "key": str(key)}:
                _aside(wire, message, lambda: cluster_probe.measure(host, port, bytes.fromhex(key))._asdict())
            case {"echo": value}:
                wire.send({"answer": message.get("ask"), "echo": value, "time": time.time()})

    def _beat(self, wire: Wire) -> None:
        with contextlib.suppress(WireBroken):
            while not self._over.is_set():
                wire.send({"alive": time.time()})
                time.sleep(BEAT_S)

    def _end_rank(self) -> None:
        rank, self._rank = self._rank, None
        if rank:
            rank.end()


def _aside(wire: Wire, message: dict[str, Any], work: Any) -> None:
    """Answer a question in a thread of its own: orders must not wait for a disk or a link."""

    def answer() -> None:
        try:
            told = work()
        except UserError as error:
            told = {"error": error.message, "hint": error.hint}
        except OSError as error:
            told = {"error": error.strerror or str(error), "hint": None}
        with contextlib.suppress(WireBroken):
            wire.send({"answer": message.get("ask"), **told})

    threading.Thread(target=answer, name="aside", daemon=True).start()


def _find(name: str) -> dict[str, Any]:
    """Where this host has a model, and what tells it from another of the same name."""
    files = resolve(name, offline=True, progress=False)
    folder = files.paths[0].parent
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(files.paths)]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    digest.update((folder / "config.json").read_bytes())
    return {"folder": str(folder), "digest": digest.hexdigest()}


def _listen(host: str, key: bytes) -> dict[str, Any]:
    """Open a door for one guest who measures the link to here."""
    door = Door(host, 0, key)

    def wait() -> None:
        with contextlib.suppress(OSError, TimeoutError, WireBroken):
            cluster_probe.answer(door)
        door.close()

    threading.Thread(target=wait, name="probe", daemon=True).start()
    return {"port": door.address[1]}


def _allowed(name: str) -> str:
    """The head may set what MLX reads, and nothing else: not PYTHONSTARTUP, not PATH."""
    if not name.startswith("MLX_") or not name.replace("_", "").isalnum():
        raise UserError(f"the head wants to set {name!r}; a node sets MLX_… only")
    return name


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # whoever started us no longer listens
        print(f"node: {words}", file=sys.stderr, flush=True)
