"""Whether two formulas are the same, for math-verify, in a process of its own.

What a model writes must not stop a run: `9^{9^{9^9}}` keeps a computer algebra busy for ever, and no thread can end it.
math-verify's own time limits use signals, which only a main thread may; without them it warns in every run. This file
is also what runs in the other process: it imports nothing of ours, and math-verify only there.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 5.0  # for one comparison
_START_S = 120.0  # SymPy is large, and the machine may be busy
_LONG_S = 60
_MEMORY = 2 << 30  # bytes of address space
_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None


def same_formula(given: str, wanted: str) -> bool:
    """Whether they are equal; not where math-verify is not installed, or does not find out in time."""
    global _process
    if importlib.util.find_spec("math_verify") is None:
        return False
    with _lock:
        if _process is None or _process.poll() is not None:
            _process = _start()
        answer = _ask(_process, json.dumps([given, wanted]).encode() + b"\n", TIME_LIMIT_S)
        if answer is None:
            close()
        return answer == b"1\n"


def close() -> None:
    """End the other process, if there is one."""
    global _process
    if _process is not None:
        _end(_process)
        _process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.kill()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            stream.close()
    process.wait()


def _start() -> subprocess.Popen[bytes]:
    close()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    if _ask(process, b"", _START_S) != b"ready\n":
        _end(process)
        raise RuntimeError("math-verify does not start in a process of its own")
    return process


def _ask(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes | None:
    """Send a line; the one that comes back, or `None` where none comes in time."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return None
    if not select.select([process.stdout], [], [], seconds)[0]:
        return None
    return process.stdout.readline() or None


def _serve() -> None:
    """The other process: a line in, a line out, until nobody asks any more."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    folder = Path(__file__).parent  # where files have names that others may ask for
    sys.path[:] = [path for path in sys.path if Path(path).absolute() != folder]
    from math_verify import parse, verify

    no_limit: dict[str, Any] = {"parsing_timeout": None}  # whoever asks has one
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        signal.alarm(_LONG_S)  # ends this process, where nobody is left who would
        gold, reply = (parse(f"${text}$", **no_limit) for text in reversed(json.loads(line)))
        sys.stdout.write(f"{int(verify(gold, reply, timeout_seconds=None))}\n")
        sys.stdout.flush()
        signal.alarm(0)


atexit.register(close)
if __name__ == "__main__":
    _serve()
