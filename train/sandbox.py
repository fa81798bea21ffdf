"""Run a program that nobody has read: in namespaces of its own, with a root of its own, no network, and little of all.

Linux only, by unprivileged user namespaces; where the kernel does not give them, nothing is run (`SandboxMissing`).
What the program sees is Python and its libraries, read-only, and an empty /tmp in memory; of this machine's files,
processes, users, network and environment it sees nothing. The verdict on its output is made outside.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..r1.errors import UserError

_SETUP_S = 5.0  # that the namespaces may take on a busy machine, besides the program's own time
_READY = b"ready\n"


class SandboxMissing(UserError):
    """This machine cannot isolate a program, so none is run."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0  # by the clock, and of the processor
    memory: int = 512 << 20  # bytes of address space a process
    disk: int = 16 << 20  # bytes in /tmp
    processes: int = 16
    output: int = 64 << 10  # bytes that are kept of each of the two streams
    open_files: int = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    code: int | None  # its exit status, negative for a signal; None where its time was over
    stdout: str
    stderr: str

    @property
    def timed_out(self) -> bool:
        """Whether its time was over."""
        return self.code is None


def run_python(source: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run Python source in a sandbox. Raises `SandboxMissing` where there is none to be had."""
    require_isolation()
    return _run(source, stdin, limits or Limits())


@cache
def require_isolation() -> None:
    """Raise `SandboxMissing` unless a program in the sandbox cannot see out of it; tried once."""
    if sys.platform != "linux":
        raise SandboxMissing("code can only be run isolated on Linux", "leave code rewards out on this machine")
    probe = "import os, socket\nassert not os.path.exists('/proc/1') and not os.path.exists('/home')\nprint('inside')"
    outcome = _run(probe, "", Limits(seconds=20.0))
    if outcome.stdout != "inside\n":
        reason = outcome.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise SandboxMissing(
            f"this machine gives no namespaces to isolate a program with: {reason[0]}",
            "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone = 1 or "
            "kernel.apparmor_restrict_unprivileged_userns = 0; in a container: its seccomp profile)",
        )


def _run(source: str, stdin: str, limits: Limits) -> Outcome:
    child = Path(__file__).with_name("sandbox_child.py")
    numbers = (limits.seconds, limits.memory, limits.disk, limits.processes, limits.open_files)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(child), *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,
        close_fds=True,
        cwd="/",
    )
    assert process.stdin is not None
    given = f"{len(source.encode())}\n".encode() + source.encode() + stdin.encode()
    try:
        out, err, in_time = _exchange(process, given, limits)
    finally:
        with suppress(ProcessLookupError):  # the first of a PID namespace takes all others along
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
    err = err.removeprefix(_READY)
    return Outcome(
        process.returncode if in_time else None,
        out[: limits.output].decode(errors="replace"),
        err[: limits.output].decode(errors="replace"),
    )


def _exchange(process: subprocess.Popen[bytes], given: bytes, limits: Limits) -> tuple[bytes, bytes, bool]:
    """Feed a process and read it, a limited amount, for a limited time; whether it ended by itself."""
    assert process.stdin and process.stdout and process.stderr
    kept: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    errors = kept[process.stderr.fileno()]
    end, started = time.monotonic() + _SETUP_S, False
    source = process.stdin.fileno()
    os.set_blocking(source, False)
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            selector.register(stream.fileno(), selectors.EVENT_READ)
        selector.register(source, selectors.EVENT_WRITE)
        while selector.get_map():
            left = end - time.monotonic()
            if left <= 0:
                return bytes(kept[process.stdout.fileno()]), bytes(errors), False
            for key, _ in selector.select(left):
                if key.fd == source:
                    given = _feed(key.fd, given)
                    if not given:
                        selector.unregister(key.fd)
                        process.stdin.close()
                    continue
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                elif len(kept[key.fd]) < limits.output + len(_READY):
                    kept[key.fd] += data
            if not started and errors.startswith(_READY):
                started, end = True, time.monotonic() + limits.seconds
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.1, end - time.monotonic()))
        return bytes(kept[process.stdout.fileno()]), bytes(errors), True
    return bytes(kept[process.stdout.fileno()]), bytes(errors), False


def _feed(stream: int, data: bytes) -> bytes:
    """Write what fits; what is left. Nothing is left for a process that does not read."""
    try:
        return data[os.write(stream, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""
