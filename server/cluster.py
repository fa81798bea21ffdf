"""A cluster as the server sees it: nodes and groups of ranks, brought up in order, told before anything is loaded.

What stands in the way (hosts that don't answer, versions that differ, a model that does not divide or fit) is a
`UserError` with the host's name. It knows the ranks only through `Group`, and nothing of HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..backends.base import Backend, LoadOptions
from ..backends.checkpoint import Checkpoint, read_checkpoint
from ..backends.cluster_group import Group, Shard, Transport
from ..backends.cluster_nodes import Node
from ..backends.cluster_split import Strategy, check_split
from ..backends.engine import Engine
from ..backends.open import Opened, open_ranks
from ..r1.cluster_plan import GPU_SHARE
from ..r1.errors import UserError
from ..r1.hub import resolve
from .cluster_flags import Reach
from .model import ServedModel, serve_opened
from .replicas import Replicas

Way = Literal["auto", "tensor", "pipeline", "replicas"]
_ASK_S = 20.0  # in which a node finds a model on its disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a user wants of a cluster."""

    model: str
    reach: Reach
    way: Way = "auto"
    transport: Literal["auto", "ring", "jaccl", "jaccl-ring"] = "auto"
    options: LoadOptions
    ready_s: float = 600.0  # that a model may take to load
    alias: str | None = None
    chat_template: str | None = None


class Cluster:
    """The nodes and groups of one head, from the door that they come through to their end."""

    def __init__(self, wanted: Wanted) -> None:
        self.groups: list[Group] = []
        self._wanted = wanted
        self._way: Way = wanted.way
        self._transport: Transport = _transport(wanted)
        self._closing = threading.Lock()
        self._closed = False
        self.nodes = wanted.reach.open()

    def load(self) -> ServedModel:
        """Bring it up. Raises `UserError` with what stands in the way."""
        wanted = self._wanted
        files = resolve(wanted.model)
        if files.format != "safetensors":
            raise UserError(
                f"{wanted.model} is no checkpoint of safetensors, which is what a cluster serves",
                "stillhouse quantize CHECKPOINT mlx-4bit writes one; a GGUF file is for `stillhouse serve`",
            )
        checkpoint = read_checkpoint(files.paths, wanted.options)
        if self._way != "auto":
            check_split(checkpoint, *self._split(self._way))
        self.nodes.wait(wanted.reach.nodes_s)
        self.nodes.check_versions()
        local = Path(wanted.model).expanduser()
        folders = self._find(str(local.resolve()) if local.exists() else wanted.model)
        if self._way == "auto":
            self._way = self._choose(checkpoint)
        strategy, size = self._split(self._way)
        self._check_room(checkpoint, size)
        members = self.nodes.nodes
        self.groups = [
            Group(
                number,
                self.nodes,
                members[first : first + size],
                Shard(
                    strategy=strategy,
                    transport=self._transport,
                    folders=folders[first : first + size],
                    options=wanted.options,
                    ready_s=wanted.ready_s,
                ),
            )
            for number, first in enumerate(range(0, len(members), size))
        ]
        opened = [self._open(group, files.paths) for group in self.groups]
        return serve_opened(
            files.name,
            opened[0],
            source=f"{files.source}, {self.words}",
            alias=wanted.alias,
            advice=files.advice,
            chat_template=wanted.chat_template,
            start=lambda backend: self._engine([backend, *(other.backend for other in opened[1:])]),
        )

    @property
    def words(self) -> str:
        """How it serves, in words."""
        hosts = len(self._wanted.reach.hosts)
        return f"{self._way} on {hosts} host{'s' * (hosts > 1)} over {self._transport}"

    @property
    def trouble(self) -> str | None:
        """Why no request can be taken now, `None` where one can."""
        troubles = [group.trouble for group in self.groups]
        if not troubles:
            return "the cluster is starting"
        return None if None in troubles else troubles[0]

    def table(self) -> dict[str, Any]:
        """What is known of it, as JSON."""
        return {
            "model": self._wanted.alias or self._wanted.model,
            "strategy": self._way,
            "backend": self._transport,
            "ready": self.trouble is None,
            "reason": self.trouble,
            "control": "{}:{}".format(*self.nodes.door.address),
            "hosts": [
                {"host": node.name, "connected": node.wire is not None, **_told(node)} for node in self.nodes.nodes
            ],
            "groups": [group.table() for group in self.groups],
        }

    def close(self) -> None:
        """End all ranks and nodes, and wait until they have."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            for group in self.groups:
                group.close()
            self.nodes.close()

    def _open(self, group: Group, paths: Sequence[Any]) -> Opened:
        return open_ranks(paths, self._wanted.options, group.start())

    def _engine(self, backends: Sequence[Backend]) -> Engine | Replicas:
        engines = [Engine(backend) for backend in backends]
        for engine, group in zip(engines, self.groups, strict=True):
            group.attach(lambda ranks, engine=engine: engine.between_steps(lambda backend: backend.renew(ranks)))  # type: ignore[attr-defined]
        return engines[0] if len(engines) == 1 else Replicas(engines, [group_up(group) for group in self.groups])

    def _split(self, way: Way) -> tuple[Strategy, int]:
        """How a group's ranks share the model, and how many they are."""
        hosts = len(self._wanted.reach.hosts)
        if way == "replicas" or hosts == 1:
            return "single", 1
        return ("pipeline" if way == "pipeline" else "tensor"), hosts

    def _choose(self, checkpoint: Checkpoint) -> Way:
        """A copy on every host serves most users and has no wire in it; what must be shared is shared by heads."""
        if all(_needed(checkpoint, 1) <= _room(node) for node in self.nodes.nodes):
            return "replicas"
        for way in ("tensor", "pipeline"):
            try:
                check_split(checkpoint, *self._split(way))
            except UserError:
                continue
            return way
        return "tensor"  # whose refusal tells most

    def _find(self, model: str) -> list[str]:
        """The folder of the model on every host. Raises `UserError` where one has none, or another one."""
        told = [self.nodes.ask(node, {"find": model}, _ASK_S) for node in self.nodes.nodes]
        if len({it["digest"] for it in told}) > 1:
            names = ", ".join(node.name for node, it in zip(self.nodes.nodes, told, strict=True) if it != told[0])
            raise UserError(
                f"the model of {names} is not the one of {self.nodes.nodes[0].name}: its files have other sizes",
                f"stillhouse pull {model}, or copy the folder, on every host",
            )
        return [it["folder"] for it in told]

    def _check_room(self, checkpoint: Checkpoint, size: int) -> None:
        needed = _needed(checkpoint, size)
        for node in self.nodes.nodes:
            if (room := _room(node)) < needed:
                raise UserError(
                    f"host {node.name} has {room / 1e9:.1f} GB for its share of {checkpoint.folder.name}, "
                    f"which takes {needed / 1e9:.1f} GB",
                    "more hosts, fewer bits, or raise iogpu.wired_limit_mb; `stillhouse cluster plan` reckons",
                )


def group_up(group: Group) -> Any:
    """Whether a group takes requests, asked again and again."""
    return lambda: group.trouble is None


def _transport(wanted: Wanted) -> Transport:
    """RDMA where every host has a device for it, else TCP. Raises `UserError` where RDMA cannot be."""
    devices = [[it for n, it in enumerate(host.rdma) if n != at] for at, host in enumerate(wanted.reach.hosts)]
    has_all = len(wanted.reach.hosts) > 1 and all(host.rdma for host in wanted.reach.hosts)
    if wanted.transport == "auto":
        if not has_all:
            return "ring"
        return "jaccl" if all(all(row) for row in devices) else "jaccl-ring"
    if wanted.transport != "ring" and not has_all:
        raise UserError(
            f"--backend {wanted.transport} needs the RDMA devices of every host",
            "mlx.distributed_config --over thunderbolt --backend jaccl --output FILE finds them; then --hostfile FILE",
        )
    return wanted.transport


def _needed(checkpoint: Checkpoint, size: int) -> int:
    """Bytes of one host's share at the least: every one keeps the embeddings, which are not counted."""
    return round(checkpoint.weights_bytes / size)


def _room(node: Node) -> int:
    """Bytes that a host's GPU may have; where it has none, those that are free."""
    hello = node.hello
    if str(hello.get("system", "")).startswith("Darwin"):
        return hello.get("wired_limit_bytes") or round(hello["memory_bytes"] * GPU_SHARE)
    return int(hello.get("free_bytes") or 0)


def _told(node: Node) -> dict[str, Any]:
    keys = ("chip", "system", "memory_bytes", "free_bytes", "versions", "rdma")
    return {key: node.hello.get(key) for key in keys}
