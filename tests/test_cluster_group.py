"""What the head promises of its nodes and ranks: a failure is known in time, told by name, and ends in a new start.

Nodes and ranks are real processes; what is left out is the model (`cluster_stand_in.py`).
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from server_fixtures import within

from stillhouse.backends import cluster_group
from stillhouse.backends.base import LoadOptions
from stillhouse.backends.cluster_group import Group, Shard
from stillhouse.backends.cluster_hosts import head_address, parse_hosts, read_hostfile
from stillhouse.backends.cluster_key import read_key
from stillhouse.backends.cluster_nodes import Nodes
from stillhouse.backends.cluster_ranks import Ranks
from stillhouse.backends.cluster_wire import Door, WireBroken, connect
from stillhouse.r1.errors import UserError

STAND_IN = Path(__file__).with_name("cluster_stand_in.py")
TWO = "127.0.0.1,127.0.0.1"


class Head:
    """Nodes and one group, without a server around them."""

    def __init__(
        self, hosts: str = TWO, folder: str = "/nowhere", ready_s: float = 20, options: LoadOptions | None = None
    ) -> None:
        self.key = secrets.token_bytes(32)
        self.door = Door("127.0.0.1", 0, self.key)
        self.hosts = parse_hosts(hosts)
        self.nodes = Nodes(self.hosts, self.door, self.key, ssh=["false"], local=[sys.executable, str(STAND_IN)])
        shard = Shard(
            strategy="tensor",
            transport="ring",
            folders=[folder] * len(self.hosts),
            options=options or LoadOptions(),
            ready_s=ready_s,
        )
        self.group = Group(0, self.nodes, self.nodes.nodes, shard)
        self.taken: list[Ranks] = []

    def up(self) -> Head:
        self.nodes.wait(20)
        self.taken.append(self.group.start())
        self.group.attach(self.taken.append)
        assert within(5, lambda: self.group.trouble is None)
        return self

    def rank(self, number: int) -> psutil.Process:
        return psutil.Process(self.group.table()["ranks"][number]["pid"])

    def close(self) -> None:
        self.group.close()
        self.nodes.close()


@pytest.fixture
def head():
    head = Head()
    yield head
    head.close()


def children() -> list[psutil.Process]:
    """Nodes and ranks of this file's that live; other tests may have left other processes."""
    return [it for it in psutil.Process().children(recursive=True) if is_ours(it)]


def is_ours(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and str(STAND_IN) in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def test_an_idle_group_proves_every_second_that_its_ranks_still_meet(head):
    head.up()
    first = head.group.table()["ranks"][0]["step"]
    assert within(5, lambda: head.group.table()["ranks"][1]["step"] >= first + 2)
    table = head.group.table()
    assert (table["state"], table["reason"], table["epoch"], table["restarts"]) == ("up", None, 1, 0)
    assert [row["up"] for row in table["ranks"]] == [True, True]
    assert table["last_step_age_s"] < 3


FAILURES = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "crashed": signal.SIGSEGV}


def test_a_rank_that_ends_is_told_by_how_it_ended_and_replaced(head):
    head.up()
    head.rank(1).kill()
    assert within(5, lambda: head.group.trouble == "rank 1 on 127.0.0.1 was ended by signal 9")
    assert within(30, lambda: head.group.trouble is None)
    assert (head.group.epoch, len(head.taken)) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_rank_that_fails_is_known_in_5_seconds_and_up_again_in_30(head, kind, number):
    head.up()
    began = time.monotonic()
    rank = head.rank(number)
    rank.send_signal(FAILURES[kind])
    assert within(5, lambda: head.group.trouble is not None)
    assert f"rank {number}" in head.group.trouble or "no collective step" in head.group.trouble, head.group.trouble
    assert within(30 - (time.monotonic() - began), lambda: head.group.trouble is None)
    assert (head.group.epoch, len(head.taken)) == (2, 2)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_node_that_is_killed_is_started_again_with_its_rank(head, number):
    head.up()
    rank = head.rank(number)
    head.nodes.nodes[number].process.kill()
    assert within(5, lambda: head.group.trouble is not None)
    assert within(30, lambda: head.group.trouble is None)
    assert not rank.is_running()


@pytest.mark.slow
def test_a_node_that_hangs_is_replaced(head):
    head.up()
    node = psutil.Process(head.nodes.nodes[1].process.pid)
    node.suspend()
    assert within(6, lambda: head.group.trouble is not None)
    assert within(30, lambda: head.group.trouble is None)
    assert not node.is_running()


def test_a_step_that_waits_ends_when_a_rank_does(head):
    ranks = head.up().taken[0]
    ranks.begin(1)
    ranks.join([1])
    head.rank(1).suspend()
    began = time.monotonic()
    with pytest.raises(UserError, match="rank 1"):
        while time.monotonic() - began < 20:
            ranks.step([1])
    assert time.monotonic() - began < 10


def test_ranks_that_do_not_meet_are_started_again_on_other_ports(monkeypatch):
    """As where a stranger holds the port of a ring: MLX takes it for the neighbour and waits for ever."""
    monkeypatch.setenv("STAND_IN", "never-joins")
    monkeypatch.setattr(cluster_group, "_JOIN_S", 0.5)
    head = Head()
    try:
        head.up()
        assert head.group.epoch == 2
    finally:
        head.close()


def test_what_a_rank_refuses_is_told_at_once_by_its_words(monkeypatch):
    monkeypatch.setenv("STAND_IN", "refuses")
    head = Head()
    try:
        with pytest.raises(UserError, match="the model is too large") as refused:
            head.up()
        assert (refused.value.hint, head.group.epoch) == ("take a smaller one", 1)
    finally:
        head.close()


def test_ranks_that_cannot_start_are_given_up_by_their_last_words(monkeypatch):
    monkeypatch.setenv("STAND_IN", "ends")
    monkeypatch.setattr(cluster_group, "_PAUSES_S", (0.0,))
    head = Head()
    try:
        with pytest.raises(UserError, match=r"rank 1 on 127\.0\.0\.1 ended with exit code 1: a library is missing"):
            head.up()
        assert head.group.epoch == cluster_group._FIRST_TRIES
    finally:
        head.close()


def test_strangers_at_the_door_change_nothing(head):
    """With no key, with another key, and with the key but as a rank that nobody waits for."""
    head.up()
    ranks = head.taken[0]
    with socket.create_connection(head.door.address) as stranger:
        stranger.sendall(os.urandom(500))
        with pytest.raises(WireBroken):
            connect(*head.door.address, b"another", {"role": "rank", "rank": 0, "epoch": 1}, 5)
        for hello in (
            {"role": "rank", "rank": 0, "epoch": 1},
            {"role": "rank", "rank": [], "epoch": {}},
            {"role": "node", "place": 9, "name": "x"},
            {},
        ):
            wire = connect(*head.door.address, head.key, hello, 5)
            with pytest.raises(WireBroken):
                wire.receive(5)
        before = ranks.table()[1]["step"]
        assert within(5, lambda: ranks.table()[1]["step"] > before + 1)
    assert (head.group.trouble, head.group.epoch, head.taken) == (None, 1, [ranks])


def test_the_end_leaves_no_process(head):
    head.up()
    living = children()
    assert len(living) == 4  # two nodes, two ranks
    head.close()
    assert within(5, lambda: not any(it.is_running() and it.status() != psutil.STATUS_ZOMBIE for it in living))


def test_the_end_does_not_wait_for_a_rank_that_hangs(head):
    head.up()
    living = children()
    head.rank(0).suspend()
    began = time.monotonic()
    head.close()
    assert time.monotonic() - began < 10
    assert within(5, lambda: not any(it.is_running() and it.status() != psutil.STATUS_ZOMBIE for it in living))


def test_the_end_comes_while_ranks_load(monkeypatch):
    monkeypatch.setenv("STAND_IN", "slow")
    head = Head()
    failed: list[Exception] = []

    def start() -> None:
        try:
            head.up()
        except UserError as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    assert within(20, lambda: head.group.epoch == 1)
    head.close()
    thread.join(10)
    assert [str(error) for error in failed] == ["the cluster is being stopped"]
    assert not children()


@pytest.mark.slow
def test_a_head_that_is_killed_leaves_no_process():
    """Nothing tells the nodes; they and the ranks notice that the wire is gone."""
    words = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from test_cluster_group import Head\n"
        "from stillhouse.backends import cluster_node\n"
        "head = Head().up()\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    popen = psutil.Popen(
        [sys.executable, "-c", words, str(STAND_IN.parent)],
        stdout=-1,
        env=os.environ | {"STAND_IN_GIVES_UP_S": "1"},
    )
    with popen.stdout:
        assert popen.stdout.readline() == b"up\n"
        living = popen.children(recursive=True)
        assert len(living) == 4
        popen.kill()
        popen.wait()
    assert within(15, lambda: not any(it.is_running() and it.status() != psutil.STATUS_ZOMBIE for it in living))


# What is told before anything is started


@pytest.mark.slow
def test_hosts_that_do_not_come_are_named():
    head = Head("127.0.0.1,203.0.113.7")
    try:
        with pytest.raises(UserError, match=r"host 203\.0\.113\.7 is not connected") as told:
            head.nodes.wait(2)
        assert "--version" in (told.value.hint or "")
    finally:
        head.close()


def test_hosts_with_other_versions_are_named(head):
    head.nodes.wait(20)
    head.nodes.check_versions()
    head.nodes.nodes[1].hello["versions"]["mlx"] = "0.1"
    with pytest.raises(UserError, match=r"different versions of mlx: 0\.1 on 127\.0\.0\.1"):
        head.nodes.check_versions()


BAD_HOSTS = {
    "no name": ("a,,b", "no list of 1 to 64 hosts"),
    "a flag of ssh": ("-oProxyCommand=evil", "no name of a host"),
    "a space": ("a b", "no name of a host"),
    "unknown": ("no-such-host.invalid", "is not known"),
}


@pytest.mark.parametrize(("text", "words"), BAD_HOSTS.values(), ids=BAD_HOSTS)
def test_a_bad_list_of_hosts_is_told(text, words):
    with pytest.raises(UserError, match=words):
        parse_hosts(text)


def test_hosts_have_a_name_for_ssh_and_an_address_for_ranks():
    here, there = parse_hosts("127.0.0.1,me@mac2=203.0.113.7")
    assert (here.is_local, here.address) == (True, "127.0.0.1")
    assert (there.is_local, there.ssh, there.address) == (False, "me@mac2", "203.0.113.7")
    assert there.answers_to("mac2") and there.answers_to("mac2.local") and not there.answers_to("mac1")
    assert head_address([here]) == "127.0.0.1"


def test_a_host_file_of_mlx_is_read(tmp_path):
    file = tmp_path / "hosts.json"
    file.write_text('[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "rdma": [null, "rdma_en5"]}]')
    (host,) = read_hostfile(str(file))
    assert (host.address, host.rdma) == ("127.0.0.1", (None, "rdma_en5"))
    for text in ("[]", "{}", '[{"ssh": "-x", "ips": ["127.0.0.1"]}]', "not JSON"):
        file.write_text(text)
        with pytest.raises(UserError):
            read_hostfile(str(file))


KEYS = {
    "missing": (None, 0o600, "there is no key file"),
    "others may read it": ("ab" * 32, 0o644, "others may read the key file"),
    "too short": ("ab", 0o600, "does not hold 64 hexadecimal digits"),
    "not hexadecimal": ("key" * 30, 0o600, "does not hold 64 hexadecimal digits"),
}


@pytest.mark.parametrize(("text", "mode", "words"), KEYS.values(), ids=KEYS)
def test_a_bad_key_file_is_told_with_the_way_out(tmp_path, text, mode, words):
    file = tmp_path / "key"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(UserError, match=words) as told:
        read_key(str(file))
    assert told.value.hint


def test_a_key_file_is_read(tmp_path):
    file = tmp_path / "key"
    file.write_text("ab" * 32 + "\n")
    file.chmod(0o600)
    assert read_key(str(file)) == b"\xab" * 32
