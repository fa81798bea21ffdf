"""The cluster's wire: who has not the key changes nothing, and what comes over it is what was sent, once, in order."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest

from stillhouse.backends import cluster_wire
from stillhouse.backends.cluster_wire import Door, WireBroken, connect
from stillhouse.r1.errors import UserError

KEY = bytes(range(32))


@pytest.fixture
def door():
    door = Door("127.0.0.1", 0, KEY, {"role": "head"})
    yield door
    door.close()


@pytest.fixture
def pair(door):
    guest = connect(*door.address, KEY, {"role": "rank", "rank": 1}, 5)
    host = door.accept(5)
    yield guest, host
    guest.close()
    host.close()


def _frame(guest, text, data=b"", ahead=0, key=None):
    """A frame as `Wire.send` would make it, from whatever text."""
    head = struct.pack("!IIQ", len(text), len(data), guest._sent + ahead)
    return head + text + data + hmac.digest(key or guest._send_key, head + text + data, hashlib.sha256)


def _push(guest, data):
    guest._socket.setblocking(True)
    guest._socket.sendall(data)


def test_both_sides_learn_what_the_other_is(pair):
    guest, host = pair
    assert host.hello == {"role": "rank", "rank": 1}
    assert guest.hello == {"role": "head"}


def test_messages_and_bytes_arrive_in_order_both_ways(pair):
    guest, host = pair
    for n in range(100):
        guest.send({"n": n}, bytes([n]) * n)
        host.send({"back": n})
    got = [host.receive(5) for _ in range(100)]
    assert [message["n"] for message, _ in got] == list(range(100))
    assert [bytes(data) for _, data in got] == [bytes([n]) * n for n in range(100)]
    assert [guest.receive(5)[0]["back"] for _ in range(100)] == list(range(100))


def test_a_long_message_arrives_whole(pair):
    guest, host = pair
    data = bytes(range(256)) * 40_000  # 10 MB: more than a socket holds
    sender = threading.Thread(target=guest.send, args=({"logits": [4, 250]}, data))
    sender.start()
    message, got = host.receive(10)
    sender.join()
    assert message == {"logits": [4, 250]}
    assert got == data


def test_waiting_in_vain_loses_nothing(pair):
    """Half a frame may have come when the time is up: the other half completes it."""
    guest, host = pair
    frame = _frame(guest, b'{"n":1}', b"data")
    _push(guest, frame[:20])
    with pytest.raises(TimeoutError):
        host.receive(0.05)
    _push(guest, frame[20:])
    message, data = host.receive(5)
    assert (message, bytes(data)) == ({"n": 1}, b"data")


def test_several_threads_may_send(pair):
    guest, host = pair
    threads = [threading.Thread(target=lambda: [guest.send({}, b"x" * 1000) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert [len(host.receive(5)[1]) for _ in range(800)] == [1000] * 800
    for thread in threads:
        thread.join()


UNFRIENDLY = {
    "a wrong seal": (lambda g: _frame(g, b"{}", key=b"another"), "seal"),
    "changed on its way": (lambda g: _frame(g, b'{"a":1}').replace(b"1", b"2"), "seal"),
    "sealed for the other way": (lambda g: _frame(g, b"{}", key=g._receive_key), "seal"),
    "a frame left out": (lambda g: _frame(g, b"{}", ahead=1), "sends message 2 where 1 comes next"),
    "a frame twice": (lambda g: _frame(g, b"{}") * 2, "sends message 1 where 2 comes next"),
    "too long": (lambda g: struct.pack("!IIQ", 2**32 - 1, 0, 0) + bytes(99), "announces a message of 4294967295"),
    "not JSON": (lambda g: _frame(g, b"\x80\x04pickle"), "no JSON object"),
    "not an object": (lambda g: _frame(g, b"[1]"), "no JSON object"),
    "as deep as the stack": (lambda g: _frame(g, b"[" * 200_000), "no JSON object"),
}


@pytest.mark.parametrize("case", UNFRIENDLY)
def test_what_no_friend_would_send_ends_the_wire_by_name(pair, case):
    guest, host = pair
    frame, words = UNFRIENDLY[case]
    _push(guest, frame(guest))
    with pytest.raises(WireBroken, match=words):
        while True:
            host.receive(5)
    with pytest.raises(WireBroken):  # and it stays ended
        host.send({})


def test_the_end_of_the_other_side_is_told(pair):
    guest, host = pair
    guest.close()
    with pytest.raises(WireBroken, match=r"hung up|broke"):
        host.receive(5)


def test_closing_wakes_whoever_receives(pair):
    guest, _ = pair
    closer = threading.Timer(0.05, guest.close)
    closer.start()
    with pytest.raises(WireBroken, match="closed"):
        guest.receive(None)
    closer.join()


def test_a_side_that_takes_nothing_does_not_hold_the_other_for_ever(pair, monkeypatch):
    guest, _ = pair
    monkeypatch.setattr(cluster_wire, "_SEND_S", 0.1)
    with pytest.raises(WireBroken, match="taken nothing"):
        guest.send({}, bytes(cluster_wire.LONGEST_DATA))


def test_a_message_that_is_too_long_is_refused_where_it_is_made(pair):
    guest, host = pair
    with pytest.raises(UserError, match="too long"):
        guest.send({"text": "x" * cluster_wire.LONGEST_JSON})
    guest.send({"still": "here"})
    assert host.receive(5)[0] == {"still": "here"}


def test_another_key_is_named_and_changes_nothing(door):
    with pytest.raises(WireBroken, match="does not take our key"):
        connect(*door.address, b"another key", {}, 5)
    _is_open(door)


def test_an_impostor_at_the_address_is_found_out():
    """A stranger that listens where the head should be has not the key, and gets no hello."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard = []

        def pretend():
            guest, _ = server.accept()
            with guest:
                guest.sendall(cluster_wire._MAGIC + bytes(32))
                heard.append(guest.recv(4096))
                guest.sendall(bytes(32))
                heard.append(guest.recv(4096))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(WireBroken, match="has not the cluster's key"):
            connect(*server.getsockname(), KEY, {"secret": "hello"}, 5)
        thread.join()
    assert b"secret" not in b"".join(heard)


def test_something_else_at_the_address_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            guest, _ = server.accept()
            with guest:
                guest.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3 and more words than a nonce has\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(WireBroken, match="no head of a cluster"):
            connect(*server.getsockname(), KEY, {}, 5)
        thread.join()


def test_nobody_at_the_address_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(WireBroken, match=f"nothing can be reached at 127.0.0.1:{address[1]}"):
        connect(*address, KEY, {}, 5)


def test_an_address_that_is_taken_is_named(door):
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{door.address[1]}"):
        Door("127.0.0.1", door.address[1], KEY)


def test_slow_strangers_hold_up_nobody_and_are_sent_away(door, monkeypatch):
    """Also more of them than are let wait: the ones that waited longest go, and friends still come in."""
    monkeypatch.setattr(cluster_wire, "_SHAKE_S", 0.3)
    began = time.monotonic()
    strangers = [socket.create_connection(door.address) for _ in range(cluster_wire._STRANGERS + 10)]
    _is_open(door)
    assert time.monotonic() - began < 3
    for stranger in strangers:
        stranger.settimeout(5)
        with stranger:
            said = b""
            while part := stranger.recv(4096):  # ends: the door hangs up
                said += part
            assert len(said) <= len(cluster_wire._MAGIC) + 32


def test_a_stranger_that_sends_byte_by_byte_gets_no_more_time(door, monkeypatch):
    monkeypatch.setattr(cluster_wire, "_SHAKE_S", 0.2)
    began = time.monotonic()
    with socket.create_connection(door.address) as stranger, pytest.raises(OSError):
        while time.monotonic() - began < 5:
            stranger.sendall(b"s")
            stranger.settimeout(0.01)
            with suppress(TimeoutError):
                if not stranger.recv(4096):
                    raise ConnectionResetError
    assert time.monotonic() - began < 4


def test_noise_at_the_door_changes_nothing(door):
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100), bytes(range(256)) * 1000, json.dumps({}).encode()):
        with socket.create_connection(door.address) as stranger, suppress(OSError):
            stranger.sendall(noise)
    _is_open(door)


def test_what_a_friend_said_once_lets_nobody_else_in(door):
    """A recorded hand-shake does not fit: the door's nonce is another one each time."""
    record = bytearray()

    class Recorder(socket.socket):
        def sendall(self, data, *_):
            record.extend(data)
            return super().sendall(data)

        def send(self, data, *_):
            record.extend(data)
            return super().send(data)

    with Recorder() as sock:
        sock.connect(door.address)
        guest = cluster_wire._introduce(sock, "door", KEY, {"role": "rank"}, time.monotonic() + 5)
        host = door.accept(5)
        assert host.hello == {"role": "rank"}
        guest.close()
        host.close()
    with socket.create_connection(door.address) as stranger:
        stranger.settimeout(5)
        stranger.sendall(record)
        said = b""
        with suppress(ConnectionResetError):
            while part := stranger.recv(4096):
                said += part
        assert len(said) <= len(cluster_wire._MAGIC) + 32
    with pytest.raises(TimeoutError):
        door.accept(0.05)
    _is_open(door)


def test_a_closed_door_lets_nobody_in():
    door = Door("127.0.0.1", 0, KEY)
    door.close()
    with pytest.raises(WireBroken):
        connect(*door.address, KEY, {}, 5)


def _is_open(door):
    """Whether a friend is let in, and nobody else was."""
    guest = connect(*door.address, KEY, {"role": "friend"}, 5)
    host = door.accept(5)
    assert host.hello == {"role": "friend"}
    guest.close()
    host.close()
