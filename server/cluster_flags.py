"""The flags of `stillhouse cluster`: which hosts, how they are reached, how they share a model."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from ..backends.base import LoadOptions
from ..backends.cluster_hosts import Host, head_address, parse_hosts, read_hostfile
from ..backends.cluster_key import new_key, read_key
from ..backends.cluster_nodes import Nodes
from ..backends.cluster_wire import Door
from ..r1.errors import UserError
from . import settings as flags

CONTROL_PORT = 8650  # where nodes of launchd look for their head
_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=5"


class Reach(NamedTuple):
    """How the hosts of a cluster are reached."""

    hosts: Sequence[Host]
    key: bytes
    address: str
    port: int
    ssh: Sequence[str]
    remote: Sequence[str]
    agents: bool
    nodes_s: float

    def open(self) -> Nodes:
        """Have nodes come from now on. Raises `UserError` where nobody can listen there."""
        door = Door(self.address, self.port, self.key, {"role": "head"})
        return Nodes(self.hosts, door, self.key, ssh=self.ssh, remote=self.remote, agents=self.agents)


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """The flags that say which hosts, and how they are reached."""
    group = parser.add_argument_group("hosts")
    flags.flag(group, "--hosts", metavar="A,B,…", help="names for ssh, or NAME=ADDRESS; a rank each, this one first")
    flags.flag(group, "--hostfile", metavar="FILE", help="hosts as mlx.distributed_config writes them, with RDMA")
    flags.flag(group, "--ssh", default=_SSH, metavar="COMMAND", help=f"how a host is reached (default {_SSH!r})")
    flags.flag(
        group, "--remote", default="stillhouse", metavar="COMMAND", help="Stillhouse over there (default stillhouse)"
    )
    group.add_argument(
        "--agents", action="store_true", help="nodes run there already (launchd) and come by themselves; --key-file"
    )
    flags.flag(group, "--key-file", metavar="FILE", help="the cluster's key; default: a new one, given to nodes by ssh")
    flags.flag(
        group, "--address", metavar="IP", help="of this host, for the others; default: the one that leads to them"
    )
    flags.flag(
        group,
        "--control-port",
        type=flags.port_number,
        metavar="PORT",
        help=f"for nodes and ranks; default: any that is free, {CONTROL_PORT} with --agents",
    )
    flags.flag(
        group,
        "--nodes-timeout",
        type=flags.seconds,
        default=30.0,
        metavar="SECONDS",
        help="in which all hosts must have come (default 30)",
    )


def add_serving(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a model is shared and loaded."""
    group = parser.add_argument_group("model")
    flags.flag(
        group,
        "--strategy",
        type=flags.one_of("auto", "tensor", "pipeline", "replicas"),
        default="auto",
        metavar="NAME",
        help="auto, tensor, pipeline or replicas; auto: a copy on every host where it fits, else tensor",
    )
    group.add_argument(  # STILLHOUSE_BACKEND is `serve`'s, whose backends are others
        "--backend",
        type=flags.one_of("auto", "ring", "jaccl", "jaccl-ring"),
        default="auto",
        metavar="NAME",
        help="auto, ring (TCP), jaccl or jaccl-ring (RDMA); auto: RDMA where --hostfile names devices",
    )
    flags.flag(group, "--context", type=flags.positive, metavar="TOKENS", help="prompt and reply together")
    flags.flag(group, "--parallel", type=flags.places, default=4, metavar="N", help="replies at once (default 4)")
    flags.flag(group, "--cache-tokens", type=flags.positive, metavar="TOKENS", help="KV cache of all requests together")
    flags.flag(
        group,
        "--batch-tokens",
        type=flags.positive,
        default=512,
        metavar="N",
        help="tokens that a step reads at most (default 512)",
    )
    group.add_argument("--cpu", action="store_true", help="compute on the CPUs, also where there are GPUs")
    flags.flag(group, "--chat-template", metavar="FILE", help="a Jinja chat template instead of the model's own")
    flags.flag(group, "--alias", metavar="NAME", help="serve the model under this name")
    flags.flag(
        group,
        "--load-timeout",
        type=flags.seconds,
        default=600.0,
        metavar="SECONDS",
        help="in which the ranks must have loaded (default 600)",
    )


def reach(arguments: argparse.Namespace) -> Reach:
    """The hosts, and how they are reached. Raises `UserError` where flags contradict."""
    if bool(arguments.hosts) == bool(arguments.hostfile):
        raise UserError("which hosts? --hosts or --hostfile, one of the two", "--hosts mac1,mac2")
    hosts = parse_hosts(arguments.hosts) if arguments.hosts else read_hostfile(arguments.hostfile)
    if arguments.agents and not arguments.key_file:
        raise UserError("--agents needs a key that the nodes have too", "--key-file FILE, the same on every host")
    ssh = shlex.split(arguments.ssh)
    remote = shlex.split(arguments.remote)
    if not ssh or not remote:
        raise UserError("--ssh and --remote are commands", "leave them out for their defaults")
    port = arguments.control_port
    return Reach(
        hosts=hosts,
        key=read_key(arguments.key_file) if arguments.key_file else new_key(),
        address=arguments.address or head_address(hosts),
        port=(CONTROL_PORT if arguments.agents else 0) if port is None else port,
        ssh=ssh,
        remote=remote,
        agents=arguments.agents,
        nodes_s=arguments.nodes_timeout,
    )


def options(arguments: argparse.Namespace) -> LoadOptions:
    """What the ranks load with."""
    return LoadOptions(
        context=arguments.context,
        parallel=arguments.parallel,
        cache_tokens=arguments.cache_tokens,
        batch_tokens=max(arguments.batch_tokens, arguments.parallel),
        gpu_layers=0 if arguments.cpu else None,
        backend="mlx",
    )
