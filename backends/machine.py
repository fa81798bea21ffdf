"""What the machine offers: cores and memory. Knows nothing of models."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil


def physical_cores() -> int:
    """Cores that a compute thread each is worth: hyper-threads count once, and only those we may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def compute_threads() -> int:
    """Threads to compute with where nobody says how many: `OMP_NUM_THREADS`, or else the physical cores."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2" is for loops within loops
    return int(told) if told.isdecimal() and int(told) else physical_cores()


def release_helpers() -> None:
    """Send away the OpenMP helpers of the calling thread; they come back when it computes the next time.

    Two threads that compute in turn (a trainer's and an engine's) have helpers each. With more of them than cores GNU's
    library has all of them sleep at every barrier instead of waiting, and a step of llama.cpp has thousands.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        pause = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).omp_pause_resource_all
    except (OSError, AttributeError):  # another library, or an old one
        return
    pause(2)  # omp_pause_hard


def free_memory() -> int:
    """Bytes of RAM that can be taken now without swapping; a container's limit counts."""
    free = psutil.virtual_memory().available
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _read(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such control group, or "max"
        return None
