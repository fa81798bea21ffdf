"""Ranks as real processes on this machine, started by hand and heard until they have loaded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from stillhouse.backends.base import Backend, LoadOptions
from stillhouse.backends.cluster_ranks import Ranks
from stillhouse.backends.cluster_wire import Door, Wire, WireBroken
from stillhouse.backends.open import open_ranks

KEY = bytes(range(32))
READY_S = 90.0
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Cluster:
    """Some ranks of one model. Closing it ends them."""

    def __init__(self, folder: Path, size: int, strategy: str, **options: Any) -> None:
        self.door = Door("127.0.0.1", 0, KEY, {"role": "head"})
        self.processes: list[subprocess.Popen[str]] = []
        self.said: list[dict[str, Any]] = []  # by rank: that it is ready, or what went wrong
        with tempfile.TemporaryDirectory() as place:
            hostfile = Path(place, "hosts.json")
            hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
            for rank in range(size):
                spec = self.spec(folder, size, strategy, rank, options)
                self.processes.append(start_rank(spec, {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}))
            wires = [self.door.accept(READY_S) for _ in range(size)]
            self.wires: list[Wire] = sorted(wires, key=lambda wire: wire.hello["rank"])
            self.said = [_until_loaded(wire) for wire in self.wires]

    def spec(self, folder: Path, size: int, strategy: str, rank: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "head": self.door.address,
            "key": KEY.hex(),
            "epoch": 1,
            "rank": rank,
            "size": size,
            "strategy": strategy,
            "model": str(folder),
            "options": dict(options),
            "ready_s": READY_S,
        }

    def close(self) -> None:
        self.door.close()
        for wire in getattr(self, "wires", []):
            wire.close()
        for process in self.processes:
            process.kill()
            process.communicate()


def start_rank(spec: Mapping[str, Any] | str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "stillhouse.backends.cluster_rank"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ONE_THREAD | environment,
    )
    assert process.stdin
    with suppress(BrokenPipeError):
        process.stdin.write((spec if isinstance(spec, str) else json.dumps(spec)) + "\n")
        process.stdin.flush()
    return process


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [it.getsockname()[1] for it in sockets]


def open_cluster(folder: Path, size: int, strategy: str = "tensor", **options: Any) -> tuple[Cluster, Backend]:
    """A backend whose model runs on so many ranks."""
    chosen = {"context": 1024} | options
    cluster = Cluster(folder, size, strategy, **chosen)
    try:
        assert all(told.get("ready") for told in cluster.said), cluster.said
        ranks = Ranks(cluster.wires, epoch=1, ready=cluster.said)
        return cluster, open_ranks(sorted(folder.glob("*.safetensors")), LoadOptions(**chosen), ranks).backend
    except BaseException:
        cluster.close()
        raise


def _until_loaded(wire: Wire) -> dict[str, Any]:
    deadline = time.monotonic() + READY_S
    with suppress(WireBroken):
        while True:
            message, _ = wire.receive(deadline - time.monotonic())
            if message.keys() & {"ready", "error"}:
                return message
    return {"error": "it ended without a word"}
