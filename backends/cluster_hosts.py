"""The hosts of a cluster as a user names them: where ssh reaches them, where their ranks listen, which is this one."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..r1.errors import UserError

_MOST = 64
_WRITE = "write --hosts mac1,mac2 or mac1=10.0.0.1,mac2=10.0.0.2 (the name for ssh, the address for the ranks)"


@dataclass(frozen=True, slots=True)
class Host:
    """One entry of `--hosts`."""

    name: str  # as the user wrote it
    ssh: str  # what ssh is given: "user@mac2"
    address: str  # IPv4, on which its rank listens
    is_local: bool  # this machine
    rdma: tuple[str | None, ...] = ()  # its device towards each host, for JACCL

    def answers_to(self, name: str) -> bool:
        """Whether a node that calls itself so is this host's."""
        short = self.ssh.rpartition("@")[2]
        return name in (self.name, short, self.address) or name.partition(".")[0] == short.partition(".")[0]


def parse_hosts(text: str) -> list[Host]:
    """`--hosts a,b=10.0.0.2`. Raises `UserError` where one has no address."""
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries) or len(entries) > _MOST:
        raise UserError(f"--hosts {text!r} is no list of 1 to {_MOST} hosts", _WRITE)
    hosts: list[Host] = []
    for entry in entries:
        ssh, _, address = entry.partition("=")
        if ssh.startswith("-") or any(c.isspace() for c in ssh):  # ssh would read it as a flag
            raise UserError(f"{ssh!r} is no name of a host", _WRITE)
        hosts.append(_host(ssh, address or ssh.rpartition("@")[2]))
    return hosts


def read_hostfile(path: str) -> list[Host]:
    """A file of `mlx.distributed_config`: a list of {"ssh", "ips", "rdma"}, or an object with it as "hosts"."""
    try:
        told: Any = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the host file {path} cannot be read: {getattr(error, 'strerror', None) or error}",
            "mlx.distributed_config --output FILE writes one",
        ) from None
    entries = told.get("hosts") if isinstance(told, dict) else told
    hosts: list[Host] = []
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case {"ssh": str(ssh), "ips": [str(address), *_]} if ssh and not ssh.startswith("-"):
                rdma = entry.get("rdma") or ()
                hosts.append(_host(ssh, address, tuple(rdma)))
            case _:
                raise UserError(f'{path}: {str(entry)[:80]} is no host with "ssh" and "ips"', "see mlx's documentation")
    if not hosts:
        raise UserError(f"the host file {path} names no host", "mlx.distributed_config --output FILE writes one")
    return hosts


def head_address(hosts: Sequence[Host]) -> str:
    """The address of this machine at which all hosts reach it: what goes to the first that is not this machine."""
    for host in hosts:
        if not host.is_local:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                try:
                    sock.connect((host.address, 9))  # sends nothing: the kernel chooses the interface
                except OSError as error:
                    raise UserError(
                        f"there is no way from here to {host.name} ({host.address}): {error.strerror or error}",
                        "is the network between them up?",
                    ) from None
                return sock.getsockname()[0]
    return hosts[0].address


def _host(ssh: str, address: str, rdma: tuple[str | None, ...] = ()) -> Host:
    try:
        found = socket.getaddrinfo(address, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise UserError(f"the host {ssh} is not known: {error.strerror or error}", _WRITE) from None
    return Host(ssh, ssh, str(found), _is_here(str(found)), rdma)


def _is_here(address: str) -> bool:
    if ipaddress.ip_address(address).is_loopback:
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            return False
    return True
