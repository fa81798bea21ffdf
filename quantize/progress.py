"""How far a long run is, and how long it still takes: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from ..r1.clock import duration

EVERY_S = 15.0  # a line, off a terminal


@contextlib.contextmanager
def meter(what: str, total: int, unit: str, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A function that is told how much more is done, of `total`; `done` was done before and says nothing of speed."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=True, smoothing=0.05) as bar:
            yield lambda more: (bar.update(more), None)[1]
        return
    started = told = time.monotonic()
    have = done

    def show(more: int) -> None:
        nonlocal have, told
        have += more
        now = time.monotonic()
        if now - told >= EVERY_S and have < total:
            told = now
            left = (now - started) / max(have - done, 1) * (total - have)
            print(f"  {have / total:.0%}, about {duration(left)} left", file=sys.stderr, flush=True)

    print(what, file=sys.stderr, flush=True)
    yield show
    print(f"  done in {duration(time.monotonic() - started)}", file=sys.stderr, flush=True)
