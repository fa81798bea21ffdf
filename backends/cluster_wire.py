"""The wire between the processes of a cluster: both sides prove a shared key, then every frame is counted and sealed.

A frame is a JSON object and, behind it, bytes: no pickle, nothing that could run. What is said is authentic and can't
be replayed, but it is not secret. It knows nothing of ranks, of nodes or of models.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..r1.errors import UserError

KEY_BYTES = 32
LONGEST_JSON = 4 << 20
LONGEST_DATA = 256 << 20  # the logits of 128 rows over 500,000 tokens
_MAGIC = b"stillhouse wire 1\n"
_NONCE = 32
_SEAL = hashlib.sha256().digest_size
_HEAD = struct.Struct("!IIQ")  # bytes of JSON, bytes of data, how many frames went before
_SHAKE_S = 5.0  # in which a stranger must have proved the key
_SEND_S = 5.0  # in which the other side must take something
_STRANGERS = 64  # that may be at the door at once; the one that waited longest goes first
_SAY_KEY = "start both sides with the same key"


class WireBroken(UserError):
    """The other side has gone, or says what nobody with the key would say. Nothing more comes over this wire."""


class Wire:
    """One connection whose other side has proved the key. One thread may receive; several may send."""

    def __init__(self, sock: socket.socket, peer: str, keys: tuple[bytes, bytes]) -> None:
        self.peer = peer
        self.hello: dict[str, Any] = {}  # what the other side said of itself
        sock.setblocking(False)
        self._socket = sock
        self._send_key, self._receive_key = keys
        self._sent = self._received = 0
        self._frame = bytearray(_HEAD.size)  # the one that is being received
        self._got = 0  # bytes of it
        self._sending = threading.Lock()
        self._broken: str | None = None

    def send(self, message: Mapping[str, Any], data: bytes | memoryview = b"") -> None:
        """Send a frame. Raises `WireBroken`, also where the other side takes nothing for 5 s."""
        text = json.dumps(message, separators=(",", ":")).encode()
        data = memoryview(data).cast("B")
        if len(text) > LONGEST_JSON or len(data) > LONGEST_DATA:
            raise UserError(
                f"a message of {len(text)} + {len(data)} bytes is too long for the cluster's wire",
                f"it carries at most {LONGEST_JSON} + {LONGEST_DATA}",
            )
        with self._sending:
            head = _HEAD.pack(len(text), len(data), self._sent)
            seal = hmac.new(self._send_key, head + text, hashlib.sha256)
            seal.update(data)
            self._sent += 1
            self._push(memoryview(head + text))
            self._push(data)
            self._push(memoryview(seal.digest()))

    def receive(self, timeout_s: float | None) -> tuple[dict[str, Any], memoryview]:
        """The next frame. Raises `TimeoutError` (and loses nothing), or `WireBroken`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._pull(_HEAD.size, deadline)
        text_size, data_size, counter = _HEAD.unpack_from(self._frame)
        if text_size > LONGEST_JSON or data_size > LONGEST_DATA:
            raise self._break(f"{self.peer} announces a message of {text_size} + {data_size} bytes")
        end = _HEAD.size + text_size + data_size
        self._pull(end + _SEAL, deadline)
        frame = memoryview(self._frame)
        self._frame, self._got = bytearray(_HEAD.size), 0
        if not hmac.compare_digest(hmac.digest(self._receive_key, frame[:end], "sha256"), frame[end:]):
            raise self._break(f"a message from {self.peer} has a seal that is not its own")
        if counter != self._received:
            raise self._break(f"{self.peer} sends message {counter} where {self._received} comes next")
        self._received += 1
        try:
            message = json.loads(bytes(frame[_HEAD.size : _HEAD.size + text_size]))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise self._break(f"{self.peer} sends what is no JSON object")
        return message, frame[_HEAD.size + text_size : end]

    def close(self) -> None:
        """Hang up; whoever receives gets `WireBroken`."""
        self._broken = self._broken or f"the wire to {self.peer} was closed"
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def detach(self) -> socket.socket:
        """Give up frames: the bare socket, for whoever measures it."""
        self._broken = f"the wire to {self.peer} was given up"
        return self._socket

    def _push(self, rest: memoryview) -> None:
        deadline = time.monotonic() + _SEND_S
        while rest:
            self._check()
            try:
                rest = rest[self._socket.send(rest) :]
                deadline = time.monotonic() + _SEND_S
            except BlockingIOError:
                if not self._wait(select.POLLOUT, deadline):
                    raise self._break(f"{self.peer} has taken nothing for {_SEND_S:g} s") from None
            except OSError as error:
                raise self._break(f"the wire to {self.peer} broke: {error}") from None

    def _pull(self, size: int, deadline: float | None) -> None:
        """Have `size` bytes of the frame."""
        if len(self._frame) < size:
            self._frame.extend(bytes(size - len(self._frame)))
        while self._got < size:
            self._check()
            try:
                with memoryview(self._frame) as whole, whole[self._got : size] as rest:
                    count = self._socket.recv_into(rest)
            except BlockingIOError:
                if not self._wait(select.POLLIN, deadline):
                    raise TimeoutError(f"{self.peer} has said nothing") from None
                continue
            except OSError as error:
                raise self._break(f"the wire to {self.peer} broke: {error}") from None
            if not count:
                raise self._break(f"{self.peer} has hung up")
            self._got += count

    def _wait(self, event: int, deadline: float | None) -> bool:
        """Wait until the socket can go on; whether it can."""
        poll = select.poll()
        with suppress(ValueError):  # closed by another thread: the next call on it says so
            poll.register(self._socket, event)
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            return bool(poll.poll(None if left_s is None else left_s * 1000))
        return True

    def _check(self) -> None:
        if self._broken:
            raise WireBroken(self._broken)

    def _break(self, words: str) -> WireBroken:
        self._broken = self._broken or words
        self.close()
        return WireBroken(self._broken)


class Door:
    """Listens. Strangers without the key are sent away, in a thread each, so that none of them holds up a friend."""

    def __init__(self, host: str, port: int, key: bytes, hello: Mapping[str, Any] | None = None) -> None:
        self._key = key
        self._hello = dict(hello or {})
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(address[:2], family=family, backlog=128)
        except OSError as error:
            raise UserError(
                f"the cluster cannot listen on {host}:{port}: {error.strerror or error}",
                "name an address of this machine, or another port (0 = any that is free)",
            ) from None
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._friends: queue.SimpleQueue[Wire] = queue.SimpleQueue()
        self._strangers: deque[socket.socket] = deque()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._listen, name="door", daemon=True).start()

    def accept(self, timeout_s: float | None) -> Wire:
        """The next connection that has proved the key. Raises `TimeoutError`."""
        try:
            return self._friends.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError("nobody with the key has come") from None

    def close(self) -> None:
        """Listen no more, and hang up on whoever has not been let in."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            for stranger in self._strangers:
                _hang_up(stranger)
        with suppress(queue.Empty):
            while True:
                self._friends.get_nowait().close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                stranger, address = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # out of files, say: some will be given back
                continue
            with self._lock:
                if len(self._strangers) >= _STRANGERS:
                    _hang_up(self._strangers.popleft())
                self._strangers.append(stranger)
            threading.Thread(target=self._ask, args=(stranger, address), name="stranger", daemon=True).start()

    def _ask(self, stranger: socket.socket, address: Any) -> None:
        try:
            wire = _welcome(stranger, f"{address[0]}:{address[1]}", self._key, self._hello)
        except (OSError, EOFError, WireBroken):
            wire = None
        with self._lock, suppress(ValueError):  # it was sent away already
            self._strangers.remove(stranger)
        if wire is None:
            _hang_up(stranger)
        elif self._closed:
            wire.close()
        else:
            self._friends.put(wire)


def connect(host: str, port: int, key: bytes, hello: Mapping[str, Any], timeout_s: float) -> Wire:
    """Go to a door, prove the key, and have it proved. Raises `WireBroken` in words for whoever started us."""
    deadline = time.monotonic() + timeout_s
    where = f"{host}:{port}"
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise WireBroken(
            f"nothing can be reached at {where}: {error.strerror or error}", "is the head of the cluster running there?"
        ) from None
    try:
        return _introduce(sock, where, key, hello, deadline)
    except (OSError, EOFError):
        _hang_up(sock)
        raise WireBroken(f"{where} did not prove the cluster's key in {timeout_s:g} s", _SAY_KEY) from None
    except BaseException:
        _hang_up(sock)
        raise


def _welcome(sock: socket.socket, peer: str, key: bytes, hello: Mapping[str, Any]) -> Wire:
    """The door's half of the hand-shake."""
    deadline = time.monotonic() + _SHAKE_S
    door_nonce = secrets.token_bytes(_NONCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(_SHAKE_S)
    sock.sendall(_MAGIC + door_nonce)
    said = _exactly(sock, len(_MAGIC) + _NONCE + _SEAL, deadline)
    guest_nonce = said[len(_MAGIC) : -_SEAL]
    if not said.startswith(_MAGIC) or not _is_proof(key, b"guest", door_nonce + guest_nonce, said[-_SEAL:]):
        raise WireBroken(f"{peer} has not the key")
    sock.sendall(_proof(key, b"door", door_nonce + guest_nonce))
    wire = Wire(sock, peer, _session(key, door_nonce + guest_nonce))
    wire.send(hello)
    wire.hello, _ = wire.receive(max(0.0, deadline - time.monotonic()))
    return wire


def _introduce(sock: socket.socket, peer: str, key: bytes, hello: Mapping[str, Any], deadline: float) -> Wire:
    """The guest's half of the hand-shake."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    said = _exactly(sock, len(_MAGIC) + _NONCE, deadline)
    if not said.startswith(_MAGIC):
        raise WireBroken(f"what listens at {peer} is no head of a cluster of this version", "check the address")
    guest_nonce = secrets.token_bytes(_NONCE)
    both = said[len(_MAGIC) :] + guest_nonce
    sock.sendall(_MAGIC + guest_nonce + _proof(key, b"guest", both))
    try:
        proof = _exactly(sock, _SEAL, deadline)
    except EOFError:
        raise WireBroken(f"{peer} does not take our key", _SAY_KEY) from None
    if not _is_proof(key, b"door", both, proof):
        raise WireBroken(f"{peer} has not the cluster's key", _SAY_KEY)
    send_key, receive_key = _session(key, both)
    wire = Wire(sock, peer, (receive_key, send_key))
    wire.send(hello)
    wire.hello, _ = wire.receive(max(0.0, deadline - time.monotonic()))
    return wire


def _exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    """So many bytes, by then: who sends them one by one gets no more time."""
    got = bytearray()
    while len(got) < size:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        part = sock.recv(size - len(got))
        if not part:
            raise EOFError
        got += part
    return bytes(got)


def _proof(key: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, _MAGIC + role + nonces, "sha256")


def _is_proof(key: bytes, role: bytes, nonces: bytes, said: bytes) -> bool:
    return hmac.compare_digest(_proof(key, role, nonces), said)


def _session(key: bytes, nonces: bytes) -> tuple[bytes, bytes]:
    """Keys of this connection alone, so that no frame of another one fits: what the door seals with, and the guest."""
    return _proof(key, b"from the door", nonces), _proof(key, b"from the guest", nonces)


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
