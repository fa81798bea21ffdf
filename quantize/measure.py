"""What a quantized model lost: a text is read by both, and the distributions are compared at every scored position.

As llama-perplexity does it: the text in chunks of `context` tokens, each beginning with BOS where the model wants one,
the second half of each scored. The base is kept in one of two ways. Exactly: its last hidden states, of which its own
output matrix makes the logits again, 20 to 50 times smaller than logits. Or as a `.kld` file, in 16 bits a token of the
vocabulary. So only one model is in memory at a time. It knows no runtime; `kld` has the formulas.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..backends.scorer import Floats, Scorer
from ..r1.errors import UserError
from .kld import (
    Ids,
    Quality,
    Scores,
    compare,
    log_softmax,
    pack,
    scored_from,
    scored_per_chunk,
    summarize,
    write_header,
)

CONTEXT = 512  # tokens a chunk: llama-perplexity's default
_HEAD_BYTES = 1 << 30  # an output matrix up to this size stays in memory as float32
_HEAD_ROWS = 8192  # of a larger one, so many rows are held at once

Progress = Callable[[int], None]  # told how many chunks are done now


def cut(ids: Sequence[int], bos_id: int | None, context: int = CONTEXT, most: int | None = None) -> Ids:
    """A text's tokens as chunks (C, context), the rest left out; raises `UserError` where not one is full.

    With `bos_id` the whole text begins with it; `read_chunk` puts it before every chunk.
    """
    if bos_id is not None and list(ids[:1]) != [bos_id]:
        ids = [bos_id, *ids]
    count = len(ids) // context
    if not count:
        raise UserError(
            f"the text has {len(ids)} tokens, and one chunk takes {context}", "measure on a longer text, or --context"
        )
    count = min(count, most or count)
    return np.asarray(ids[: count * context], np.int32).reshape(count, context)


def as_read(chunk: Ids, bos_id: int | None) -> list[int]:
    """A chunk (context,) as the model is given it: BOS takes the place of its first token."""
    ids = chunk.tolist()
    return ids if bos_id is None else [bos_id, *ids[1:]]


def targets(chunk: Ids) -> Ids:
    """What the text goes on with after each scored position of a chunk."""
    return chunk[scored_from(len(chunk)) + 1 :]


class Base(Protocol):
    """What the quantized model is compared with."""

    @property
    def chunks(self) -> Ids:
        """The text, (C, context)."""
        ...

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    def log_probs(self, chunk: int, start: int, stop: int) -> Floats:
        """Of the scored positions `start` to `stop` of a chunk: (stop - start, V)."""
        ...


class Matrix(Protocol):
    """An output matrix on disk: a `weights.Tensor` is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, D)."""
        ...

    def read(self, start: int, stop: int, /) -> Floats:
        """Rows as float32."""
        ...


@dataclass(frozen=True, slots=True)
class ExactBase:
    """The base's last hidden states of every scored position, and its output matrix."""

    chunks: Ids
    states: Floats  # (C x scored, D)
    head: Matrix

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.shape[0]

    def log_probs(self, chunk: int, start: int, stop: int) -> Floats:
        """Of the scored positions `start` to `stop` of a chunk: (stop - start, V)."""
        first = chunk * scored_per_chunk(self.chunks.shape[1])
        return log_softmax(times(self.states[first + start : first + stop], self.head))


@dataclass(frozen=True, slots=True)
class Held:
    """A matrix in memory."""

    rows: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, D)."""
        return self.rows.shape

    def read(self, start: int, stop: int) -> Floats:
        """Rows as they are."""
        return self.rows[start:stop]


def hold(matrix: Matrix) -> Matrix:
    """The matrix in memory, if it is small enough to stay there."""
    rows, cols = matrix.shape
    return Held(matrix.read(0, rows)) if rows * cols * 4 <= _HEAD_BYTES else matrix


def times(states: Floats, head: Matrix) -> Floats:
    """Hidden states (N, D) to logits (N, V), a slab of the matrix at a time."""
    rows = head.shape[0]
    out = np.empty((len(states), rows), np.float32)
    for start in range(0, rows, _HEAD_ROWS):
        stop = min(rows, start + _HEAD_ROWS)
        out[:, start:stop] = states @ head.read(start, stop).T
    return out


def save_states(path: Path, bases: Mapping[str, ExactBase], source: str) -> None:
    """Keep what the base said of some texts; its output matrix stays where it is."""
    arrays: dict[str, Any] = {f"{kind}/{name}": values for name, b in bases.items() for kind, values in _arrays(b)}
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, source=np.array(source), **arrays)
    os.replace(partial, path)


def load_states(path: Path, source: str, head: Matrix) -> dict[str, ExactBase]:
    """Read it again. Raises `UserError` where it is another source's."""
    try:
        with np.load(path) as kept:
            names = [key.removeprefix("states/") for key in kept.files if key.startswith("states/")]
            whose, width = str(kept["source"]), {kept[f"states/{name}"].shape[1] for name in names}
            found = {name: ExactBase(kept[f"chunks/{name}"], kept[f"states/{name}"], head) for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} has no hidden states: {error}", "delete it: it is made again") from None
    if whose != source or width != {head.shape[1]}:
        raise UserError(f"{path} was made from {whose}, not from {source}", "name another file for --states")
    return found


def _arrays(base: ExactBase) -> tuple[tuple[str, Ids], tuple[str, Floats]]:
    return ("chunks", base.chunks), ("states", base.states)


def keep_states(scorer: Scorer, chunks: Ids, head: Matrix, progress: Progress | None = None) -> ExactBase:
    """Have the base read the text."""
    slabs = []
    for chunk in chunks:
        ids = as_read(chunk, scorer.bos_id)
        slabs.append(scorer.states(ids[:-1], scored_from(len(chunk))))
        if progress:
            progress(1)
    return ExactBase(chunks, np.concatenate(slabs), hold(head))


def write_kld(path: Path, scorer: Scorer, chunks: Ids, progress: Progress | None = None) -> None:
    """Have the base read the text, and keep its log-probabilities as llama-perplexity does."""
    with path.open("wb") as file:
        write_header(file, chunks, scorer.vocabulary_size)
        for chunk in chunks:
            for logits in _scored(scorer, chunk):
                file.write(pack(logits).tobytes())
            if progress:
                progress(1)


def measure(base: Base, scorer: Scorer, progress: Progress | None = None) -> Quality:
    """Have the quantized model read the same text, and compare."""
    if scorer.vocabulary_size != base.vocabulary:
        raise UserError(
            f"the base has {base.vocabulary} tokens in its vocabulary and the quantized model {scorer.vocabulary_size}",
            "compare a file with the model that it was made from",
        )
    parts: list[Scores] = []
    for number, chunk in enumerate(base.chunks):
        expected, start = targets(chunk), 0
        for logits in _scored(scorer, chunk):
            stop = start + len(logits)
            parts.append(compare(base.log_probs(number, start, stop), log_softmax(logits), expected[start:stop]))
            start = stop
        if progress:
            progress(1)
    return summarize(Scores.join(parts))


def _scored(scorer: Scorer, chunk: Ids) -> Iterator[Floats]:
    """Logits of a chunk's scored positions; the last token only says what comes after the one before."""
    return scorer.logits(as_read(chunk, scorer.bos_id)[:-1], scored_from(len(chunk)))
