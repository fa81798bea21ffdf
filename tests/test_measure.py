"""The loss is measured as llama-perplexity defines it, and a text is never judged by what it was tuned on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from stillhouse.quantize import kld
from stillhouse.quantize.measure import (
    ExactBase,
    Held,
    as_read,
    cut,
    keep_states,
    measure,
    targets,
    write_kld,
)
from stillhouse.r1.errors import UserError

V, D, CONTEXT = 37, 8, 16


class TableModel:
    """A model that expects after a token what a table says: (V, D) states times a (V, D) output matrix."""

    runtime = "table"
    vocabulary_size = V

    def __init__(self, seed: int, bos_id: int | None = 0, noise: float = 0.0) -> None:
        random = np.random.default_rng(seed)
        self.table = random.standard_normal((V, D)).astype(np.float32)
        self.table += noise * np.random.default_rng(99).standard_normal((V, D)).astype(np.float32)
        self.head = random.standard_normal((V, D)).astype(np.float32)
        self.bos_id = bos_id

    def encode(self, text: str) -> list[int]:
        return [byte % V for byte in text.encode()]

    def states(self, ids: Sequence[int], first: int) -> np.ndarray:
        return self.table[np.asarray(ids[first:])]

    def logits(self, ids: Sequence[int], first: int) -> Iterator[np.ndarray]:
        for start in range(first, len(ids), 3):
            yield self.states(ids[: start + 3], start) @ self.head.T

    def close(self) -> None: ...


def reference(base: TableModel, quantized: TableModel, chunks: np.ndarray) -> tuple[list[float], list[float]]:
    """KL and nll of every scored position, written as the definition reads, in float64."""
    divergences, nlls = [], []
    for chunk in chunks:
        ids = [base.bos_id, *chunk[1:]] if base.bos_id is not None else list(chunk)
        for at in range(CONTEXT // 2, CONTEXT - 1):
            z, y = (model.table[ids[at]].astype(float) @ model.head.T.astype(float) for model in (base, quantized))
            p, q = (np.exp(logits - np.log(np.exp(logits).sum())) for logits in (z, y))
            keep = np.log(p) > -16
            divergences.append(float((p * np.log(p / q))[keep].sum()))
            nlls.append(-math.log(q[chunk[at + 1]]))
    return divergences, nlls


@pytest.fixture
def chunks() -> np.ndarray:
    return cut(np.random.default_rng(3).integers(1, V, 5 * CONTEXT + 3).tolist(), 0, CONTEXT)


def test_the_measured_loss_is_that_of_the_definition(chunks):
    base, quantized = TableModel(1), TableModel(1, noise=0.2)

    quality = measure(keep_states(base, chunks, Held(base.head)), quantized)

    divergences, nlls = reference(base, quantized, chunks)
    assert quality.tokens == len(divergences) == 5 * (CONTEXT - 1 - CONTEXT // 2)
    assert quality.kl.value == pytest.approx(np.mean(divergences), rel=1e-4)
    assert quality.kl.error == pytest.approx(np.std(divergences, ddof=1) / len(divergences) ** 0.5, rel=1e-4)
    assert quality.kl_percentiles["99"] == pytest.approx(np.percentile(divergences, 99), rel=1e-4)
    assert quality.ppl.value == pytest.approx(math.exp(np.mean(nlls)), rel=1e-5)


def test_a_model_against_itself_has_lost_nothing(chunks):
    model = TableModel(1)
    quality = measure(keep_states(model, chunks, Held(model.head)), model)
    assert (quality.same_top.value, quality.ln_ppl_ratio.value) == (1.0, 0.0)
    assert abs(quality.kl_max) < 1e-6


def test_a_kld_file_gives_what_the_exact_base_gives_but_for_its_16_bits(chunks, tmp_path):
    base, quantized = TableModel(1), TableModel(1, noise=0.2)
    write_kld(tmp_path / "base.kld", base, chunks)

    exact = measure(keep_states(base, chunks, Held(base.head)), quantized)
    packed = measure(kld.KldFile(tmp_path / "base.kld"), quantized)

    assert packed.kl.value == pytest.approx(exact.kl.value, abs=1e-4)
    assert packed.ppl_base.value == pytest.approx(exact.ppl_base.value, rel=1e-4)


@pytest.mark.parametrize("vocabulary", [36, 37])
def test_a_kld_file_is_read_as_it_was_written(vocabulary, tmp_path):
    random = np.random.default_rng(0)
    chunks = random.integers(0, vocabulary, (2, 8), np.int32)
    logits = (random.standard_normal((2 * 3, vocabulary)) * 9).astype(np.float32)
    with (tmp_path / "a.kld").open("wb") as file:
        kld.write_header(file, chunks, vocabulary)
        file.write(kld.pack(logits).tobytes())

    found = kld.KldFile(tmp_path / "a.kld")

    assert np.array_equal(found.chunks, chunks)
    exact = kld.log_softmax(logits)
    read = np.concatenate([found.log_probs(0, 0, 3), found.log_probs(1, 0, 2), found.log_probs(1, 2, 3)])
    clipped = np.maximum(exact, exact.max(axis=1, keepdims=True) - 16)
    assert np.abs(read - clipped).max() < 16 / 65535


def test_logits_that_are_all_the_same_make_a_kld_row():
    rows = kld.pack(np.zeros((1, 4), np.float32))
    assert kld.unpack(rows, 4) == pytest.approx(np.full((1, 4), math.log(0.25)))


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"GGUF" * 8, "not a .kld"), (b"_logits_" + b"\x10\0\0\0" + b"\4\0\0\0" + b"\2\0\0\0", "cut short")],
    ids=["another format", "cut short"],
)
def test_a_file_that_is_no_kld_is_refused(data, words, tmp_path: Path):
    (tmp_path / "a.kld").write_bytes(data)
    with pytest.raises(UserError, match=words):
        kld.KldFile(tmp_path / "a.kld")


def test_models_of_different_vocabularies_are_not_compared(chunks):
    base = TableModel(1)
    with pytest.raises(UserError, match="vocabulary"):
        measure(ExactBase(chunks, np.zeros((40, D), np.float32), Held(base.head[:-1])), base)


def test_the_text_is_cut_as_llama_perplexity_cuts_it():
    chunks = cut(range(1, 12), 0, context=4)
    assert chunks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert as_read(chunks[1], 0) == [0, 5, 6, 7]
    assert as_read(chunks[1], None) == [4, 5, 6, 7]
    assert targets(chunks[1]).tolist() == [7]
    assert cut(range(8), None, context=4, most=1).tolist() == [[0, 1, 2, 3]]


def test_a_text_shorter_than_a_chunk_is_refused():
    with pytest.raises(UserError, match="3 tokens, and one chunk takes 4"):
        cut([1, 2, 3], None, context=4)
