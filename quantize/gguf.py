"""The GGUF writer: a plan carried out in one read of the source, on all cores, and resumable at any byte.

Each thread takes a slab of rows: reads it as floats, quantizes it to every type that some plan wants, writes it to its
place in each file, and notes it in the journal. So a ladder of files costs one read, memory does not grow with the
model, and reading, computing and writing overlap. A file grows under `NAME.partial` with zeros for a header; the header
comes last, and the name after that, so that nothing bad is ever found under a good name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from ..backends.machine import free_memory
from ..r1.cache import size_text
from ..r1.errors import UserError
from .architectures import Metadata
from .errors import NoRoom, SourceInvalid
from .gguf_blocks import Blocks, Floats, is_valid, library, quantize
from .journal import Journal, Slab, belongs
from .plan import SLAB_WEIGHTS, Plan
from .progress import meter
from .source import hash_files
from .weights import Tensor, Weights

BASE_BYTES = 350_000_000  # Python, ggml, a tokenizer of 150,000 tokens: measured, with some air


@dataclass(frozen=True, slots=True)
class Output:
    """A file that is being written."""

    plan: Plan
    partial: Path
    journal: Path
    fingerprint: str

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run left something to go on with."""
        return self.partial.is_file() and belongs(self.journal, self.fingerprint)


def outputs(plans: Sequence[Plan], weights: Weights, importance: Mapping[str, Floats]) -> list[Output]:
    """Where each plan's bytes gather until it is done; plans for one path are rivals, and each has its own place."""
    digest = hashlib.sha256()
    for name in sorted(importance):
        digest.update(name.encode() + importance[name].tobytes())
    code = hashlib.sha256(Path(library()).read_bytes()).hexdigest()
    found = []
    for number, plan in enumerate(plans):
        rivals = [other for other in plans[:number] if other.path == plan.path]
        name = plan.path.name + (f".{len(rivals) + 1}" if rivals else "")
        found.append(
            Output(
                plan,
                plan.path.with_name(f"{name}.partial"),
                plan.path.with_name(f"{name}.journal"),
                plan.fingerprint(weights, digest.hexdigest(), code),
            )
        )
    return found


def check_room(wanted: Sequence[Output], threads: int, *, resume: bool) -> None:
    """Refuse, before the first byte, what the disk or the memory cannot take. Raises `NoRoom`."""
    by_folder: dict[Path, int] = {}
    for output in wanted:
        folder = output.plan.path.absolute().parent
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}", "make it first, or choose another with --output")
        have = output.partial.stat().st_blocks * 512 if resume and output.is_begun else 0
        by_folder[folder] = by_folder.get(folder, 0) + max(0, output.plan.file_size - have)
    for folder, needed in by_folder.items():
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise NoRoom(
                f"the files need {size_text(needed)}, and {folder} has {size_text(free)} free",
                "free some space, or put them elsewhere with --output",
            )
    if (needed := memory_needed(wanted, threads)) > (free := free_memory()):
        raise NoRoom(
            f"quantizing takes {size_text(needed)} of memory, and {size_text(free)} are free",
            "close other programs, or take fewer --threads",
        )


def memory_needed(wanted: Sequence[Output], threads: int) -> int:
    """Bytes of memory beside the page cache, whatever the model's size."""
    widest = max(entry.shape[-1] for output in wanted for entry in output.plan.entries)
    return BASE_BYTES + threads * 4 * max(SLAB_WEIGHTS, widest) * (2 + len(wanted) // 2)


def write(
    wanted: Sequence[Output], weights: Weights, importance: Mapping[str, Floats], *, threads: int, resume: bool
) -> dict[str, str]:
    """Write the tensors of all plans; returns the SHA-256 of each source file, by name.

    What is left after an error or Ctrl-C is a `.partial` with its journal, for `resume`. Raises `SourceInvalid` where a
    weight is not a finite number or a source file is not what the hub said, `NoRoom` where the disk is full.
    """
    with contextlib.ExitStack() as stack:
        for output in wanted:
            stack.enter_context(_alone(output))
        files = [stack.enter_context(_opened(output, resume)) for output in wanted]
        run = _Run(weights, importance, files)
        with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as hasher:
            run.forget_what_does_not_match(pool)
            jobs = run.jobs()
            total = sum(tensor.size for tensor in weights.tensors)
            left = sum((stop - start) * weights.tensors[i].matrix[1] for i, start, stop in jobs)
            names = ", ".join(output.plan.path.name for output in wanted)
            with meter(f"writing {names}", total, "w", done=total - left) as show, _no_space():
                hashes = hasher.submit(hash_files, weights.files, lambda: run.is_stopped)
                futures = [pool.submit(run.slab, *job) for job in jobs]
                try:
                    for future in as_completed(futures):
                        show(future.result())
                    return hashes.result()
                except BaseException:
                    run.is_stopped = True
                    pool.shutdown(cancel_futures=True)
                    raise


def seal(output: Output, metadata: Metadata) -> None:
    """Give a file its header: from here on it is whole, if still without its name."""
    with output.partial.open("r+b") as file, _no_space():
        file.write(output.plan.finished_header(metadata))
        file.flush()
        os.fsync(file.fileno())


def publish(output: Output) -> Path:
    """Give a file its name. Returns it."""
    output.partial.replace(output.plan.path)
    output.journal.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(output.plan.path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    return output.plan.path


def discard(output: Output) -> None:
    """Delete what was written of a file."""
    output.partial.unlink(missing_ok=True)
    output.journal.unlink(missing_ok=True)


@dataclass(slots=True)
class _File:
    output: Output
    descriptor: int
    journal: Journal


@dataclass(slots=True)
class _Run:
    """One pass over the source; `slab` is called from many threads."""

    weights: Weights
    importance: Mapping[str, Floats]
    files: list[_File]
    is_stopped: bool = False
    _slabs_left: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def jobs(self) -> list[tuple[int, int, int]]:
        """Tensor, first row, last row of every slab that some file lacks."""
        found = []
        for index, entry in enumerate(self.files[0].output.plan.entries):
            for start, stop in entry.slabs():
                if any(Slab(index, start) not in file.journal.done for file in self.files):
                    found.append((index, start, stop))
        for index, _, _ in found:
            self._slabs_left[index] = self._slabs_left.get(index, 0) + 1
        return found

    def forget_what_does_not_match(self, pool: ThreadPoolExecutor) -> None:
        """Read again what an earlier run says it wrote; a machine that lost power may have lost some of it."""

        def check(file: _File, slab: Slab, crc: int) -> None:
            plan = file.output.plan
            entry = plan.entries[slab.tensor]
            stop = dict(entry.slabs()).get(slab.start)
            size = 0 if stop is None else plan.place(entry, stop) - plan.place(entry, slab.start)
            if not size or zlib.crc32(os.pread(file.descriptor, size, plan.place(entry, slab.start))) != crc:
                del file.journal.done[slab]

        futures = [pool.submit(check, file, *item) for file in self.files for item in list(file.journal.done.items())]
        for future in as_completed(futures):
            future.result()

    def slab(self, index: int, start: int, stop: int) -> int:
        """Quantize and write some rows of a tensor; returns how many weights."""
        if self.is_stopped:
            return 0
        tensor = self.weights.tensors[index]
        if start == 0 and index + 1 < len(self.weights.tensors):
            self.weights.tensors[index + 1].advise(True)
        by_type: dict[str, list[_File]] = {}
        for file in self.files:
            if Slab(index, start) not in file.journal.done:
                by_type.setdefault(file.output.plan.entries[index].type, []).append(file)
        floats: Floats | None = None
        for type, files in by_type.items():
            if type == tensor.type:
                blocks = tensor.read_raw(start, stop)
            else:
                floats = tensor.read(start, stop) if floats is None else floats
                blocks = quantize(type, floats, self.importance.get(tensor.name))
            # ggml makes ordinary blocks of a NaN, so the floats are looked at, too; their sum is one if any is.
            if not is_valid(type, blocks) or (floats is not None and not math.isfinite(floats.sum())):
                raise SourceInvalid(
                    f"{tensor.name} has a NaN or an infinity in its rows {start} to {stop - 1}",
                    "the checkpoint is damaged, or its training diverged: nothing good can come of it",
                )
            crc = zlib.crc32(blocks.data)
            for file in files:
                plan = file.output.plan
                _write_at(file.descriptor, blocks, plan.place(plan.entries[index], start))
                file.journal.note(Slab(index, start), crc)
        self._let_go(index, tensor)
        return (stop - start) * tensor.matrix[1]

    def _let_go(self, index: int, tensor: Tensor) -> None:
        with self._lock:
            self._slabs_left[index] -= 1
            is_last = not self._slabs_left[index]
        if is_last:
            tensor.advise(False)


def _write_at(descriptor: int, blocks: Blocks, place: int) -> None:
    view = blocks.data.cast("B")
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


@contextlib.contextmanager
def _opened(output: Output, resume: bool) -> Iterator[_File]:
    resume = resume and output.is_begun
    journal = Journal(output.journal, output.fingerprint, resume=resume)
    descriptor = os.open(output.partial, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_TRUNC), 0o644)
    try:
        os.ftruncate(descriptor, output.plan.file_size)
        yield _File(output, descriptor, journal)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        journal.close()


@contextlib.contextmanager
def _alone(output: Output) -> Iterator[None]:
    """Hold a file's lock, so that two runs do not write the same file. Raises `UserError`."""
    from filelock import FileLock, Timeout

    lock = FileLock(output.partial.with_name(output.partial.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is writing {output.plan.path.name}", "wait until it is done") from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


@contextlib.contextmanager
def _no_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom("the disk is full", "free some space; --resume goes on where it stopped") from None
        raise
