"""One rank of a cluster, a process of its own: `python -m stillhouse.backends.cluster_rank`, with a `Spec` on stdin.

It decides nothing. It connects to the head, finds the other ranks (`MLX_RANK`, `MLX_HOSTFILE`), loads its share, and
then executes what each control message says, in order. Whatever goes wrong, it says one line and ends: a rank whose
states can't be trusted is worth nothing, and one that nobody talks to shall not live.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from ..r1.errors import UserError
from .base import LoadOptions
from .checkpoint import read_checkpoint
from .cluster_split import STRATEGIES, Strategy, check_split
from .cluster_wire import Wire, WireBroken, connect

if TYPE_CHECKING:
    from .mlxlm_executor import LocalExecutor

STOPPED, BAD, FAILED, LOST = 0, 2, 70, 71  # exit codes: told to stop, a user's error, a step failed, no head
BEAT_S = 0.5
_CONNECT_S = 10.0
_OPTIONS = ("context", "parallel", "cache_tokens", "kv_type", "batch_tokens", "gpu_layers")  # that a rank hears of


@dataclass(frozen=True, slots=True)
class Spec:
    """What a rank is told at its start."""

    head: tuple[str, int]
    key: bytes
    epoch: int
    rank: int
    size: int
    strategy: Strategy
    model: Path  # a folder of this machine
    options: LoadOptions
    ready_s: float  # in which it must have loaded
    waits: bool = False  # for a word of the head before it looks for the others: they find one another at once

    @classmethod
    def parse(cls, line: str) -> Spec:
        """From a line of JSON. Raises `UserError`."""
        try:
            told = json.loads(line)
            host, port = told["head"]
            options = {name: told["options"][name] for name in _OPTIONS if name in told["options"]}
            spec = cls(
                head=(str(host), int(port)),
                key=bytes.fromhex(told["key"]),
                epoch=int(told["epoch"]),
                rank=int(told["rank"]),
                size=int(told["size"]),
                strategy=told["strategy"],
                model=Path(told["model"]),
                options=LoadOptions(**options, backend="mlx"),
                ready_s=float(told["ready_s"]),
                waits=bool(told.get("waits")),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(f"a rank is started with a line of JSON on its stdin, not with this ({reason})") from None
        if spec.strategy not in STRATEGIES or not 0 <= spec.rank < spec.size or spec.ready_s <= 0:
            raise UserError(f"there is no rank {spec.rank} of {spec.size} by the strategy {str(spec.strategy)[:40]!r}")
        return spec


class Rank:
    """Executes messages, and says so twice a second."""

    def __init__(self, spec: Spec, wire: Wire) -> None:
        self._spec = spec
        self._wire = wire
        self._step = 0

    def start(self) -> None:
        """Begin to say that this process lives, and end it when nobody hears that any more."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def load(self) -> tuple[LocalExecutor, Callable[[], None]]:
        """The share in memory, and what meets the other ranks. Raises `UserError`, or what MLX raises."""
        spec = self._spec
        if not (spec.model / "config.json").is_file():
            raise UserError(f"there is no model folder {spec.model}", "copy it to the same place on every host")
        weights = sorted(spec.model.glob("*.safetensors"))
        if not weights:
            raise UserError(f"there are no safetensors in {spec.model}", "copy the whole folder to every host")
        checkpoint = read_checkpoint(weights, spec.options)
        check_split(checkpoint, spec.strategy, spec.size)
        try:
            from . import mlxlm_share
            from .mlxlm_executor import LocalExecutor
        except ImportError as error:
            raise UserError(f"MLX cannot be loaded: {error}", 'pip install "stillhouse[mlx]"') from None
        if spec.waits:
            self._wire.send({"here": True})
            self._wire.receive(None)
        group = mlxlm_share.join_group(spec.rank, spec.size)
        self._wire.send({"joined": True})
        share, fitted = mlxlm_share.load_share(checkpoint, spec.options, spec.strategy, spec.rank, spec.size, group)
        return LocalExecutor(share, fitted), lambda: mlxlm_share.meet(group)

    def serve(self, executor: LocalExecutor, meet: Callable[[], None]) -> int:
        """Execute messages until one says stop, or one does not fit what came before. The exit code."""
        calls: dict[str, Callable[..., Any]] = {
            name: getattr(executor, name) for name in ("begin", "copy", "drop", "join", "part", "read", "step", "clear")
        }
        calls["beat"] = meet
        while True:
            message, _ = self._wire.receive(None)
            epoch, step, ops = (message.get(name) for name in ("epoch", "step", "ops"))
            if (epoch, step) != (self._spec.epoch, self._step + 1) or not isinstance(ops, list):
                raise WireBroken(
                    f"a message of epoch {str(epoch)[:20]}, step {str(step)[:20]} came where epoch {self._spec.epoch}, "
                    f"step {self._step + 1} was next"
                )
            logits = None
            for op in ops:
                if op == ["stop"]:
                    return STOPPED
                if not isinstance(op, list) or not op or op[0] not in calls:
                    raise WireBroken(f"a message asks for {json.dumps(op)[:60]}, which no rank does")
                logits = calls[op[0]](*op[1:])
            self._step += 1
            answer: dict[str, Any] = {"epoch": epoch, "step": step, "memory_bytes": executor.memory_bytes()}
            if logits is None or self._spec.rank:
                self._wire.send(answer)
            else:
                self._wire.send(answer | {"shape": logits.shape}, logits.data)

    def _beat(self) -> None:
        while True:
            try:
                self._wire.send({"beat": self._step, "at": time.time()})
            except WireBroken as error:
                end(LOST, f"rank {self._spec.rank}: {error}")
            time.sleep(BEAT_S)


def end(code: int, words: str = "") -> NoReturn:
    """End now, whatever MLX's threads are waiting for."""
    if words:
        print(f"error: {_one_line(words)}", file=sys.stderr, flush=True)
    os._exit(code)


def main() -> NoReturn:
    """From the line on stdin to the exit code."""
    try:
        spec = Spec.parse(sys.stdin.readline())
        wire = connect(*spec.head, spec.key, hello(spec), _CONNECT_S)
    except WireBroken as error:
        end(LOST, str(error))
    except UserError as error:
        end(BAD, str(error))
    # MLX may wait for its neighbours for ever, and no thread here runs meanwhile: only the system can end it.
    signal.setitimer(signal.ITIMER_REAL, spec.ready_s)
    rank = Rank(spec, wire)
    rank.start()
    try:
        executor, meet = rank.load()
        ready = {"ready": True, "context": executor.context_length, "cache_tokens": executor.cache_tokens}
        wire.send(ready | {"memory_bytes": executor.memory_bytes()})
        signal.setitimer(signal.ITIMER_REAL, 0)
        end(rank.serve(executor, meet))
    except WireBroken as error:
        end(LOST, f"rank {spec.rank}: {error}")
    except Exception as error:  # MLX has no family of errors of its own
        is_users = isinstance(error, UserError)
        words, hint = (error.message, error.hint) if is_users else (str(error) or type(error).__name__, None)
        with suppress(WireBroken):
            wire.send({"error": _one_line(words), "user": is_users, "hint": hint})
        end(BAD if is_users else FAILED, f"rank {spec.rank}: {words}")


def hello(spec: Spec) -> Mapping[str, Any]:
    """What a rank says of itself."""
    return {
        "role": "rank",
        "rank": spec.rank,
        "epoch": spec.epoch,
        "pid": os.getpid(),
        "versions": {name: _version(name) for name in ("stillhouse", "mlx", "mlx-lm")},
        "memory_bytes": psutil.virtual_memory().total,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _one_line(words: str) -> str:
    return " ".join(words.split())[:400]


if __name__ == "__main__":
    main()
