"""How fast one host's link to another is: round trips of a few bytes, then as many bytes as pass in a while."""

from __future__ import annotations

import socket
import statistics
import time
from typing import NamedTuple

from .cluster_wire import Door, Wire, connect

_PINGS = 200
_CHUNK = 1 << 20
_PUSH_S = 0.5  # for which bytes are sent
_WAIT_S = 10.0


class LinkSpeed(NamedTuple):
    """One direction of one link."""

    round_trip_s: float  # the median
    bytes_per_s: float


def answer(door: Door) -> None:
    """Be measured by the one guest that comes."""
    wire = door.accept(_WAIT_S)
    with _bare(wire) as sock:
        for _ in range(_PINGS):
            sock.sendall(_take(sock, 1))
        took = 0
        while True:
            chunk = sock.recv(_CHUNK)
            if not chunk:
                break
            took += len(chunk)
        sock.sendall(took.to_bytes(8, "big"))


def measure(host: str, port: int, key: bytes) -> LinkSpeed:
    """Measure the link to whoever answers there."""
    wire = connect(host, port, key, {"role": "probe"}, _WAIT_S)
    with _bare(wire) as sock:
        trips: list[float] = []
        for _ in range(_PINGS):
            began = time.perf_counter()
            sock.sendall(b"p")
            _take(sock, 1)
            trips.append(time.perf_counter() - began)
        chunk, began = bytes(_CHUNK), time.perf_counter()
        while time.perf_counter() - began < _PUSH_S:
            sock.sendall(chunk)
        sock.shutdown(socket.SHUT_WR)
        took = int.from_bytes(_take(sock, 8), "big")  # comes when the last byte has
        return LinkSpeed(statistics.median(trips), took / (time.perf_counter() - began))


def _bare(wire: Wire) -> socket.socket:
    """The socket under a wire: seals would be what is measured."""
    sock = wire.detach()
    sock.settimeout(_WAIT_S)
    return sock


def _take(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the other side has hung up")
        data += part
    return data
