"""How far one next-token distribution is from another: log-probabilities in, numbers out; and llama.cpp's `.kld` files.

Everything is as llama-perplexity has it (tools/perplexity/perplexity.cpp), so that numbers can be compared: KL of base
against quantized in nats, over the tokens to which the base gives more than e^-16. Pure functions on arrays; it knows
no model. Shapes: N positions, V tokens in the vocabulary.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..r1.errors import UserError

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]

FLOOR = -16.0  # nats: what the base finds less likely counts as nothing
_MAGIC = b"_logits_"
_STEPS = 65535  # a .kld file has 16 bits for a log-probability
PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)


def log_softmax(logits: Floats) -> Floats:
    """Natural log-probabilities: (N, V) -> (N, V)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32)


class Scores(NamedTuple):
    """What became of every scored position, each (N,)."""

    kl: NDArray[np.float64]  # nats, base || quantized
    nll: NDArray[np.float64]  # of the text's own next token, nats
    nll_base: NDArray[np.float64]
    same_top: NDArray[np.bool_]  # whether both find the same token likeliest

    @classmethod
    def join(cls, parts: Iterable[Scores]) -> Scores:
        """Parts one after the other."""
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def compare(base: Floats, quantized: Floats, targets: Ids) -> Scores:
    """Score N positions: log-probabilities (N, V) of both, and the tokens (N,) that the text goes on with."""
    at = np.arange(len(targets))
    weight = np.where(base > FLOOR, np.exp(base), 0)
    kl = np.einsum("nv,nv->n", weight, base - quantized, dtype=np.float64, casting="same_kind")
    return Scores(
        kl,
        -quantized[at, targets].astype(np.float64),
        -base[at, targets].astype(np.float64),
        base.argmax(axis=-1) == quantized.argmax(axis=-1),
    )


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.6f} ± {self.error:.6f}"


@dataclass(frozen=True, slots=True)
class Quality:
    """What a quantized model lost, over one text. Shares are 0 to 1, the rest is in nats."""

    tokens: int  # that were scored
    kl: Estimate
    kl_percentiles: dict[str, float]  # "99.9" -> nats
    kl_max: float
    same_top: Estimate  # share of positions at which both find the same token likeliest
    ppl: Estimate  # perplexity of the quantized model
    ppl_base: Estimate
    ln_ppl_ratio: Estimate  # ln(PPL(quantized) / PPL(base))
    dp_mean: Estimate  # change of the probability of the text's own token
    dp_rms: Estimate
    dp_percentiles: dict[str, float]

    def as_json(self) -> dict[str, object]:
        """The same as plain values; an estimate is {value, error}."""
        found = asdict(self)
        return {name: item._asdict() if isinstance(item, Estimate) else item for name, item in found.items()}


def summarize(scores: Scores) -> Quality:
    """The figures that llama-perplexity prints, of all scored positions."""
    kl, nll, nll_base, same_top = scores
    count = len(kl)
    if not count:
        raise ValueError("nothing was scored")
    dp = np.exp(-nll) - np.exp(-nll_base)
    log_ppl, log_ppl_base, squares = _mean(nll), _mean(nll_base), _mean(dp**2)
    covariance = (np.mean(nll * nll_base) - nll.mean() * nll_base.mean()) / max(1, count - 1)
    ratio = log_ppl.value - log_ppl_base.value
    ratio_error = max(0.0, log_ppl.error**2 + log_ppl_base.error**2 - 2 * float(covariance)) ** 0.5
    rms, top = squares.value**0.5, float(same_top.mean())
    return Quality(
        tokens=count,
        kl=_mean(kl),
        kl_percentiles=_percentiles(kl),
        kl_max=float(kl.max()),
        same_top=Estimate(top, (top * (1 - top) / max(1, count - 1)) ** 0.5),
        ppl=_exp(log_ppl),
        ppl_base=_exp(log_ppl_base),
        ln_ppl_ratio=Estimate(ratio, ratio_error),
        dp_mean=_mean(dp),
        dp_rms=Estimate(rms, 0.5 / rms * squares.error if rms else 0.0),
        dp_percentiles=_percentiles(dp),
    )


def _mean(values: NDArray[np.float64]) -> Estimate:
    error = (values.var() / (len(values) - 1)) ** 0.5 if len(values) > 10 else 0.0
    return Estimate(float(values.mean()), float(error))


def _exp(log: Estimate) -> Estimate:
    value = float(np.exp(log.value))
    return Estimate(value, value * log.error)


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    """Linear between the two nearest of the sorted values."""
    return {f"{p:g}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


# llama.cpp's file: b"_logits_", u32 context, i32 vocabulary, i32 chunks, the tokens of all chunks as i32, then for each
# scored position f32 step, f32 least log-probability, and a u16 a token (one more where V is odd).


def row_width(vocabulary: int) -> int:
    """How many u16 a position takes in a `.kld` file."""
    return 2 * ((vocabulary + 1) // 2) + 4


def scored_from(context: int) -> int:
    """The first position of a chunk that is scored: what comes before has too little context to be judged."""
    return context // 2


def scored_per_chunk(context: int) -> int:
    """How many positions of a chunk are scored; the last one has no next token."""
    return context - 1 - scored_from(context)


def pack(logits: Floats) -> NDArray[np.uint16]:
    """Logits (N, V) as rows of a `.kld` file: (N, row_width(V)), rounded like llama.cpp's."""
    count, vocabulary = logits.shape
    rows = np.zeros((count, row_width(vocabulary)), np.uint16)
    most = logits.max(axis=-1)
    least = np.maximum(logits.min(axis=-1), most - np.float32(16))
    total = np.exp(logits - most[:, None]).sum(axis=-1, dtype=np.float64)
    step = (most - least) / np.float32(_STEPS)
    rows[:, :2] = step.view(np.uint16).reshape(count, 2)
    rows[:, 2:4] = (least - most - np.log(total).astype(np.float32)).view(np.uint16).reshape(count, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(step > 0, np.float32(1) / step, np.float32(0))
    above = np.maximum(logits - least[:, None], 0)
    rows[:, 4 : 4 + vocabulary] = np.rint(inverse[:, None] * above)
    return rows


def unpack(rows: NDArray[np.uint16], vocabulary: int) -> Floats:
    """Rows of a `.kld` file as log-probabilities (N, V)."""
    step = np.ascontiguousarray(rows[:, :2]).view(np.float32)
    least = np.ascontiguousarray(rows[:, 2:4]).view(np.float32)
    return step * rows[:, 4 : 4 + vocabulary].astype(np.float32) + least


class KldFile:
    """A `.kld` file on disk: the text as chunks of tokens (chunks, context), and the base's log-probabilities."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(20)
            if len(head) < 20 or head[:8] != _MAGIC:
                raise UserError(f"{path.name} is not a .kld file", "llama-perplexity --kl-divergence-base writes one")
            self.context, self.vocabulary, count = struct.unpack("<Iii", head[8:])
            if not (2 <= self.context < 1 << 24 and 0 < self.vocabulary < 1 << 24 and 0 < count < 1 << 24):
                raise UserError(f"{path.name} has a header that makes no sense", "write it again")
            self._rows = count * scored_per_chunk(self.context)
            start = 20 + 4 * self.context * count
            wanted, size = start + self._rows * row_width(self.vocabulary) * 2, os.fstat(file.fileno()).st_size
            if size < wanted:
                raise UserError(f"{path.name} is cut short: {size} bytes of {wanted}", "write it again")
            tokens = np.frombuffer(file.read(start - 20), np.int32)
        self.chunks: Ids = tokens.reshape(count, self.context)
        shape = (self._rows, row_width(self.vocabulary))
        self._data = np.memmap(path, np.uint16, "r", offset=start, shape=shape)

    def log_probs(self, chunk: int, start: int, stop: int) -> Floats:
        """Of the scored positions `start` to `stop` of a chunk: (stop - start, V)."""
        first = chunk * scored_per_chunk(self.context)
        return unpack(self._data[first + start : first + stop], self.vocabulary)


def write_header(file: BinaryIO, chunks: Ids, vocabulary: int) -> None:
    """Begin a `.kld` file; `pack`'s rows of every chunk's scored positions follow, in order."""
    count, context = chunks.shape
    file.write(_MAGIC + struct.pack("<Iii", context, vocabulary, count) + chunks.astype("<i4").tobytes())
