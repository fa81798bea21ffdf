"""Vector code for three of ggml's types: the same bytes several times as fast, or it is not used.

ggml makes its K-quants one number after the other. `kernel.c` does the same arithmetic in the same order, a vector of
blocks at a time. It is compiled for this processor at first use, with the compiler that llama.cpp wanted anyway, and
kept in the user's cache. Before a type is taken from it, its bytes are compared with ggml's on thousands of blocks;
without a compiler, or where one bit differs, ggml does the work. STILLHOUSE_KERNEL=ggml asks for that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES = {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
BLOCK = 256
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-Wno-psabi")
_SOURCE = Path(__file__).with_name("kernel.c")
_lock = threading.Lock()
_found: dict[str, Any] = {}

Reference = Callable[[str, NDArray[np.float32]], NDArray[np.uint8]]


def quantizer(type: str, ggml: Any, reference: Reference) -> Callable[[int, int, int], None] | None:
    """A function of (weights, room for the blocks, how many blocks), both addresses; `None` = leave it to ggml.

    `ggml` is its library, `reference` what it makes of rows (R, C).
    """
    if type not in TYPES or os.environ.get("STILLHOUSE_KERNEL") == "ggml":
        return None
    with _lock:
        if type not in _found:
            _found[type] = _checked(type, ggml, reference)
    return _found[type]


def _checked(type: str, ggml: Any, reference: Reference) -> Callable[[int, int, int], None] | None:
    path = _compiled()
    if path is None:
        return None
    function = ctypes.CDLL(str(path)).stillhouse_quantize
    function.restype = None
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    fallback = ctypes.cast(ggml.ggml_quantize_chunk, ctypes.c_void_p)

    def run(weights: int, out: int, blocks: int) -> None:
        function(TYPES[type], weights, out, blocks, fallback)

    rows = _trial()
    wanted = reference(type, rows)
    found = np.zeros_like(wanted)
    run(rows.ctypes.data, found.ctypes.data, rows.size // BLOCK)
    return run if (found == wanted).all() else None


def _trial() -> NDArray[np.float32]:
    """Rows of many kinds: like real weights, large and tiny, all of one sign, mostly 0, whole numbers."""
    random = np.random.default_rng(0)
    plain = random.standard_normal((256, 1024))
    kinds = [plain, random.standard_t(3, (256, 1024)) * 0.02, np.abs(plain) + 1, np.rint(plain * 2)]
    kinds += [plain * (random.random((256, 1024)) < 0.1), plain * 10.0 ** random.integers(-8, 4, (256, 1024))]
    return np.concatenate(kinds).astype(np.float32)


def _processor() -> str:
    """What this processor can do: a cache that moves to another machine must not bring instructions it lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    can = sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return "\n".join([platform.node(), platform.machine(), platform.processor(), *can])


def _compiled() -> Path | None:
    """The library, compiled now or earlier; `None` where there is no compiler or no place for it."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None or not hasattr(os, "getuid"):
        return None
    told = [_SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, _processor()]
    name = hashlib.sha256("\0".join(told).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"
    path = folder / f"kernel-{name}.so"
    try:
        if path.is_file() and path.stat().st_uid == os.getuid():
            return path
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *FLAGS, "-o", str(made), str(_SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(path)
        return path
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None
