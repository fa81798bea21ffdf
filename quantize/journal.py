"""What of a file is done already: a line for every slab, written after the slab itself.

A process may die at any moment, and the machine too. So a line carries its slab's CRC-32, a line that was not finished
counts as none, and whoever goes on reads the slabs again and believes only those that match. It knows no types.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NamedTuple


class Slab(NamedTuple):
    """A run of rows of one tensor."""

    tensor: int  # its place in the plan
    start: int  # its first row


class Journal:
    """The file beside a `.partial`; its methods may be called from any thread."""

    def __init__(self, path: Path, fingerprint: str, *, resume: bool) -> None:
        self.path = path
        self.done: dict[Slab, int] = {}  # slab -> CRC-32, as far as an earlier run came
        self._lock = threading.Lock()
        if resume and path.is_file():
            self.done = _read(path, fingerprint)
        fresh = not (resume and path.is_file() and _belongs(path, fingerprint))
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if fresh else os.O_APPEND), 0o644)
        os.write(self._file, f"{fingerprint}\n".encode() if fresh else b"\n")  # a cut line must not grow into a new one

    def note(self, slab: Slab, crc: int) -> None:
        """A slab is in the file."""
        with self._lock:
            os.write(self._file, f"{slab.tensor} {slab.start} {crc:08x}\n".encode())

    def close(self) -> None:
        """End writing; the file stays."""
        os.close(self._file)


def belongs(path: Path, fingerprint: str) -> bool:
    """Whether a journal is one of this plan."""
    return path.is_file() and _belongs(path, fingerprint)


def _belongs(path: Path, fingerprint: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(fingerprint) + 1) == f"{fingerprint}\n".encode()


def _read(path: Path, fingerprint: str) -> dict[Slab, int]:
    if not _belongs(path, fingerprint):
        return {}
    done = {}
    for line in path.read_bytes().split(b"\n")[1:-1]:  # the last one has no end
        words = line.split()
        if len(words) == 3 and len(words[2]) == 8:
            try:
                done[Slab(int(words[0]), int(words[1]))] = int(words[2], 16)
            except ValueError:  # a line that a crash left half written
                continue
    return done
