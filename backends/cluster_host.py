"""What a machine says of itself to the head of its cluster: versions, chip, memory, RDMA, clock. Imports no runtime."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from .. import __version__
from .machine import free_memory

EQUAL = ("stillhouse", "mlx", "mlx-lm")  # packages that must have one version on all hosts
_MB = 1024 * 1024


def describe() -> dict[str, Any]:
    """All of it, as JSON."""
    return {
        "name": socket.gethostname(),
        "pid": os.getpid(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "chip": _chip(),
        "memory_bytes": psutil.virtual_memory().total,
        "free_bytes": free_memory(),
        "wired_limit_bytes": _wired_limit(),
        "rdma": _rdma(),
        "versions": versions(),
        "time": time.time(),
    }


def versions() -> dict[str, str]:
    """Of what must be equal, "" where it is not installed."""
    found = {"stillhouse": __version__}
    for package in EQUAL[1:]:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def _chip() -> str:
    if platform.system() == "Darwin":
        return _told_by("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _wired_limit() -> int | None:
    """What macOS lets its GPU keep, where somebody has set it; 0 = macOS decides. `None` elsewhere."""
    told = _told_by("sysctl", "-n", "iogpu.wired_limit_mb")
    return int(told) * _MB if told.isdecimal() else None


def _rdma() -> str:
    """ "enabled" or "disabled" as macOS says it; "none" where there is no such thing."""
    told = _told_by("rdma_ctl", "status").lower()
    return "enabled" if "enabled" in told else "disabled" if told else "none"


def _told_by(*command: str) -> str:
    """What a command prints, "" where there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
