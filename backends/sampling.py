"""How a token is drawn: the written reference that every backend's sampler is tested against.

The order is the one that the figures recommended for R1 (temperature 0.6, top-p 0.95) were found with: logit bias,
penalties, temperature, and only then the truncations. llama.cpp's own tools apply the temperature last, which keeps
more unlikely tokens at the same settings; our llama.cpp chain follows this file instead.

Slow and plain on purpose: backends sample in C or on the GPU. It knows one row of logits at a time.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Sampling

Row = NDArray[np.float64]


def distribution(logits: Row, sampling: Sampling, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> Row:
    """Probabilities that the next token is drawn from: (V,) -> (V,), DRY and XTC left out.

    DRY depends on breakers in the text and XTC on a draw of its own; their sources are named in `docs/sampling.md`.
    """
    row = np.array(logits, dtype=np.float64)
    for token_id, bias in sampling.logit_bias:
        row[token_id] += bias
    row = _penalized(row, sampling, prompt_ids, reply_ids)
    if sampling.temperature <= 0:
        likeliest = np.zeros_like(row)
        likeliest[row.argmax()] = 1.0
        return likeliest
    row = row / sampling.temperature
    row = np.where(_top_k(row, sampling.top_k), row, -np.inf)
    for truncate, threshold in ((_typical, sampling.typical_p), (_top_p, sampling.top_p), (_min_p, sampling.min_p)):
        row = np.where(truncate(_softmax(row), threshold), row, -np.inf)
    return _softmax(row)


def seed32(seed: int | None) -> int:
    """Fold any seed into the 32 bits that samplers take; a new random one for `None`."""
    whole = secrets.randbits(64) if seed is None else seed
    return (whole ^ (whole >> 32)) % 0xFFFFFFFF  # llama.cpp takes 0xFFFFFFFF for "any"


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural-log probabilities of one row of logits, (V,) -> (V,)."""
    top = logits.max()
    return logits - (top + np.log(np.exp(logits - top).sum(dtype=np.float64)).astype(np.float32))


def likeliest(logprobs: NDArray[np.float32], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of one row, with their log-probabilities, likeliest first."""
    if count == 0:
        return ()
    ids = np.argpartition(-logprobs, min(count, logprobs.size - 1))[:count]
    ids = ids[np.argsort(-logprobs[ids], kind="stable")]
    return tuple((int(i), float(logprobs[i])) for i in ids)


def mask_to(logits: NDArray[np.float32], bits: NDArray[np.uint32]) -> None:
    """Put every token that `bits` leaves out beyond reach, in place. Raises `ValueError` where it leaves out all."""
    allowed = np.unpackbits(bits.view(np.uint8), bitorder="little", count=logits.size).astype(bool)
    if not allowed.any():
        raise ValueError("no token is allowed next")
    logits[~allowed] = -np.inf


def _softmax(row: Row) -> Row:
    exps = np.exp(row - row.max())
    return exps / exps.sum()


def _penalized(row: Row, sampling: Sampling, prompt_ids: Sequence[int], reply_ids: Sequence[int]) -> Row:
    window = sampling.penalty_last_n
    if window <= 0:
        return row
    for token_id in set([*prompt_ids, *reply_ids][-window:]):  # CTRL (arXiv 1909.05858), divided or multiplied by sign
        factor = sampling.repetition_penalty
        row[token_id] = row[token_id] * factor if row[token_id] <= 0 else row[token_id] / factor
    for token_id, count in Counter(reply_ids[-window:]).items():  # OpenAI's definition of the two
        row[token_id] -= count * sampling.frequency_penalty + sampling.presence_penalty
    return row


def _top_k(row: Row, k: int) -> NDArray[np.bool_]:
    if k <= 0 or k >= row.size:
        return np.ones(row.size, dtype=bool)
    return row >= np.sort(row)[-k]


def _typical(probs: Row, p: float) -> NDArray[np.bool_]:
    """Locally typical sampling (arXiv 2202.00666): those nearest to the entropy in surprise, up to mass p."""
    if p >= 1:
        return np.ones(probs.size, dtype=bool)
    surprise = -np.log(np.maximum(probs, 1e-300))
    entropy = float((probs * surprise).sum())
    return _up_to_mass(probs, np.argsort(np.abs(surprise - entropy), kind="stable"), p)


def _top_p(probs: Row, p: float) -> NDArray[np.bool_]:
    """Nucleus sampling (arXiv 1904.09751): the likeliest tokens, up to and with the one that reaches mass p."""
    return np.ones(probs.size, dtype=bool) if p >= 1 else _up_to_mass(probs, np.argsort(-probs, kind="stable"), p)


def _min_p(probs: Row, p: float) -> NDArray[np.bool_]:
    """Min-p (arXiv 2407.01082): tokens at least p times as likely as the likeliest."""
    return probs >= p * probs.max()


def _up_to_mass(probs: Row, order: NDArray[np.intp], mass: float) -> NDArray[np.bool_]:
    count = int(np.searchsorted(np.cumsum(probs[order]), mass)) + 1
    keep = np.zeros(probs.size, dtype=bool)
    keep[order[:count]] = True
    return keep
