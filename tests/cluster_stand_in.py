"""A node whose ranks hold no model: they join, load and step at once, and say so over the same wire as real ones.

Run as a program: the node's agent, or with `rank` the rank itself. `STAND_IN` in the environment makes its ranks
misbehave: `never-joins`, `refuses`, `ends` (before it has loaded), `slow` (a second to load).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import replace

from stillhouse.backends import cluster_node
from stillhouse.backends.cluster_node import NodeOptions, run
from stillhouse.backends.cluster_wire import WireBroken, connect

VOCABULARY = 259


def rank() -> None:
    spec = json.loads(sys.stdin.readline())
    way = os.environ.get("STAND_IN", "")
    hello = {"role": "rank", "rank": spec["rank"], "epoch": spec["epoch"], "pid": os.getpid()}
    wire = connect(*spec["head"], bytes.fromhex(spec["key"]), hello, 5)
    step = 0

    def beat() -> None:
        try:
            while True:
                wire.send({"beat": step, "at": time.time()})
                time.sleep(0.2)
        except WireBroken:
            os._exit(71)

    threading.Thread(target=beat, daemon=True).start()
    wire.send({"here": True})
    wire.receive(None)
    if way == "never-joins" and spec["epoch"] == 1:
        time.sleep(600)
    wire.send({"joined": True})
    if way == "refuses":
        wire.send({"error": "the model is too large", "user": True, "hint": "take a smaller one"})
        os._exit(2)
    if way == "ends" and spec["rank"] == 1:
        print("a library is missing", file=sys.stderr, flush=True)
        os._exit(1)
    if way == "slow":
        time.sleep(1)
    wire.send({"ready": True, "context": 512, "cache_tokens": 2048})
    while True:
        message, _ = wire.receive(None)
        step, logits, shape = message["step"], b"", None
        for name, *arguments in message["ops"]:
            if name == "stop":
                os._exit(0)
            if name == "step":
                shape = [len(arguments[0]), VOCABULARY]
                logits = bytes(4 * shape[0] * shape[1])
        told = {"epoch": spec["epoch"], "step": step}
        if spec["rank"] == 0 and shape:
            wire.send(told | {"shape": shape}, logits)
        else:
            wire.send(told)


REAL = "real"  # as what misbehaves: ranks of MLX


def node(arguments: list[str]) -> int:
    host, _, port = arguments[arguments.index("--join") + 1].rpartition(":")
    key = bytes.fromhex(sys.stdin.readline())
    place = int(arguments[arguments.index("--place") + 1])
    cluster_node._GIVE_UP_S = float(os.environ.get("STAND_IN_GIVES_UP_S", "15"))
    options = NodeOptions((host, int(port)), key, place=place)
    if os.environ.get("STAND_IN") != REAL:
        options = replace(options, rank_command=(sys.executable, __file__, "rank"))
    return run(options)


if __name__ == "__main__":
    if sys.argv[1:] == ["rank"]:
        rank()
    sys.exit(node(sys.argv[1:]))
