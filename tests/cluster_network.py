"""A second host on this machine: a network namespace behind a link that can be cut, and what is ssh to it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SSH = """#!/bin/sh
# as ssh does: the words behind the host's name are one command line of a shell over there
shift
exec ip netns exec {name} sh -c "$*"
"""


class SecondHost:
    """Reached at `address`; this machine is `here` on the same link."""

    def __init__(self, folder: Path) -> None:
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            pytest.skip("network namespaces need root")
        if shutil.which("ip") is None:
            pytest.skip("there is no ip(8) here")
        number = os.getpid() % 200 + 20
        self.here, self.address = f"10.99.{number}.1", f"10.99.{number}.2"
        self._name, self._link = f"stillhouse{number}", f"still{number}"
        done = subprocess.run(["ip", "netns", "add", self._name], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this system gives no network namespaces: {done.stderr.strip()}")
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._name)
        _ip("addr", "add", f"{self.here}/24", "dev", self._link)
        _ip("link", "set", self._link, "up")
        self._there("addr", "add", f"{self.address}/24", "dev", "eth0")
        self._there("link", "set", "lo", "up")
        self._there("link", "set", "eth0", "up")
        self.ssh = folder / "ssh"
        self.ssh.write_text(SSH.format(name=self._name))
        self.ssh.chmod(self.ssh.stat().st_mode | stat.S_IXUSR)
        self.flags = ("--ssh", str(self.ssh), "--remote", f"{sys.executable} -m stillhouse")

    def cut(self) -> None:
        """As a cable that is pulled: nothing arrives, and nobody is told."""
        self._there("link", "set", "eth0", "down")

    def mend(self) -> None:
        self._there("link", "set", "eth0", "up")

    def pids(self) -> list[int]:
        """The processes that run there."""
        told = subprocess.run(["ip", "netns", "pids", self._name], capture_output=True, text=True)
        return [int(line) for line in told.stdout.split()]

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self._name], capture_output=True)
        subprocess.run(["ip", "link", "del", self._link], capture_output=True)

    def _there(self, *words: str) -> None:
        _ip("-n", self._name, *words)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
