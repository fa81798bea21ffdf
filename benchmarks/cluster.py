"""One stream on several ranks of this machine: MLX's own sharded generation, ours, and ours over HTTP.

usage: python benchmarks/cluster.py FOLDER [--ranks 2] [--tokens 200] [--rounds 7] [--http]

Raw is mlx-lm's `generate_step` on a sharded model in ranks that were started by hand, nothing else: no server, no
control messages, and always a token ahead. Ours is the scheduler here and the same number of ranks; `--http` is
`stillhouse cluster serve`. All are started before the first round, take turns, and stand still meanwhile. Tokens/s are
of the tokens after the first, greedy, and the ratios are of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from stillhouse.backends.base import GenerationRequest, Sampling
from stillhouse.backends.engine import Engine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # which know how to start ranks by hand
from cluster_ranks import free_ports, open_cluster

PROMPT = [(7 * place) % 250 for place in range(20)]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def raw_rank(folder: Path, tokens: int) -> None:
    """One rank of raw generation: a line in, a line of tokens/s out."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    group = mx.distributed.init(strict=True, backend="ring")
    model, _ = load_model(folder, lazy=True)
    model.shard(group)
    mx.eval(model.parameters())
    print("ready", flush=True)
    for _ in sys.stdin:
        times = [time.perf_counter() for _ in generate_step(mx.array(PROMPT), model, max_tokens=tokens)]
        print((len(times) - 1) / (times[-1] - times[0]), flush=True)


def start_raw(folder: Path, ranks: int, tokens: int, ends: ExitStack) -> Callable[[], float]:
    hostfile = Path(ends.enter_context(tempfile.TemporaryDirectory()), "hosts.json")
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), "--tokens", str(tokens), "--raw-rank"],
            env=ONE_THREAD | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1},
        )
        for rank in range(ranks)
    ]
    for process in processes:
        ends.callback(process.kill)
        process.stdout.readline()

    def run() -> float:
        for process in processes:
            process.stdin.write("go\n")
        first, *_ = [process.stdout.readline() for process in processes]
        return float(first)

    return run


def start_ours(folder: Path, ranks: int, tokens: int, ends: ExitStack) -> Callable[[], float]:
    cluster, backend = open_cluster(folder, ranks)
    ends.callback(cluster.close)
    engine = Engine(backend)
    ends.callback(engine.close)

    def run() -> float:
        request = GenerationRequest("1", PROMPT, tokens, Sampling(temperature=0), ignore_eos=True)
        times = [time.perf_counter() for _ in engine.generate([request])]
        return (len(times) - 1) / (times[-1] - times[0])

    return run


def start_http(folder: Path, ranks: int, tokens: int, ends: ExitStack) -> Callable[[], float]:
    (port,) = free_ports(1)
    hosts = ",".join(["127.0.0.1"] * ranks)
    command = [sys.executable, "-m", "stillhouse", "cluster", "serve", str(folder), "--hosts", hosts]
    process = subprocess.Popen([*command, "--strategy", "tensor", "--port", str(port)], env=ONE_THREAD)
    ends.callback(process.wait)
    ends.callback(process.terminate)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(f"{url}/health/ready", timeout=5).close()
            break
        except OSError:
            if process.poll() is not None:
                raise SystemExit("cluster serve has ended") from None
            time.sleep(0.2)
    with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
        name = json.load(response)["data"][0]["id"]
    body = {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }

    def run() -> float:
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            times = [time.perf_counter() for line in response if line.startswith(b"data: {")]
        return (tokens - 1) / (times[-1] - times[0])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--raw-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.raw_rank:
        raw_rank(arguments.folder, arguments.tokens)
        return
    starts = {"raw": start_raw, "ours": start_ours} | ({"http": start_http} if arguments.http else {})
    with ExitStack() as ends:
        runs = {
            name: start(arguments.folder, arguments.ranks, arguments.tokens, ends) for name, start in starts.items()
        }
        for run in runs.values():  # warms up
            run()
        rounds = [{name: run() for name, run in runs.items()} for _ in range(arguments.rounds)]
    for name in runs:
        speed = statistics.median(told[name] for told in rounds)
        ratio = statistics.median(told[name] / told["raw"] for told in rounds)
        each = ", ".join(f"{told[name]:.0f}" for told in rounds)
        print(f"{name}: {speed:.0f} tokens/s, {ratio:.2f} of raw ({each})")


if __name__ == "__main__":
    main()
