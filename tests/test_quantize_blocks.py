"""ggml's blocks: the right sizes, the right bytes whatever the slabs and threads, and back."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stillhouse.backends.ggml import dequantize, row_bytes
from stillhouse.quantize import gguf_blocks as blocks
from stillhouse.quantize import gguf_kernel

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "BF16", "F16")


def weights(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32) * 0.02


@pytest.mark.parametrize("type", TYPES)
def test_what_comes_back_is_as_close_as_its_bits_allow(type):
    rows = weights(8, 512)
    packed = blocks.quantize(type, rows)
    assert packed.shape == (8, row_bytes(type, 512))
    error = np.square(dequantize(type, packed, 512) - rows).mean() / np.square(rows).mean()
    assert error < 8 * 0.25 ** min(blocks.bits_per_weight(type), 9)  # 9: the mantissa of a BF16


@pytest.mark.parametrize("type", ("Q4_K", "IQ4_XS", "Q8_0"))
@pytest.mark.parametrize("weighted", (False, True))
def test_slabs_and_threads_change_no_byte(type, weighted):
    rows = weights(37, 512)
    importance = np.random.default_rng(1).random(512).astype(np.float32) if weighted else None
    whole = blocks.quantize(type, rows, importance)
    out = np.zeros_like(whole)
    cuts = [(start, min(start + 5, 37)) for start in range(0, 37, 5)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda cut: blocks.quantize(type, rows[slice(*cut)], importance, out[slice(*cut)]), cuts))
    assert (out == whole).all()


def test_importance_changes_what_is_rounded_well():
    rows, importance = weights(64, 256), np.full(256, 1e-4, np.float32)
    importance[:32] = 1
    plain, weighed = (
        np.square(dequantize("Q4_K", blocks.quantize("Q4_K", rows, how), 256) - rows)[:, :32].sum()
        for how in (None, importance)
    )
    assert weighed < plain


def test_a_row_that_is_no_multiple_of_the_block_is_refused():
    with pytest.raises(ValueError, match="576 is not a multiple of Q4_K's 256"):
        blocks.quantize("Q4_K", weights(1, 576))


def test_importance_of_another_width_is_refused():
    with pytest.raises(ValueError, match="importance of shape"):
        blocks.quantize("Q4_0", weights(1, 64), np.ones(32, np.float32))


def test_infinity_in_a_scale_is_found():
    packed = blocks.quantize("Q8_0", weights(1, 32))
    assert blocks.is_valid("Q8_0", packed)
    packed[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    assert not blocks.is_valid("Q8_0", packed)


def test_what_needs_importance_is_known():
    assert [blocks.needs_importance(type) for type in ("Q4_K", "IQ4_XS", "IQ2_XXS", "IQ1_S")] == [
        *(False, False, True, True)
    ]


@pytest.mark.parametrize("type", gguf_kernel.TYPES)
def test_the_fast_code_gives_ggmls_bytes_or_is_not_used(type):
    random = np.random.default_rng(7)
    plain = random.standard_t(4, (300, 512)) * 0.02
    odd = [np.zeros((4, 512)), np.ones((4, 512)), -(plain[:8] ** 2), plain[:64] * (random.random((64, 512)) < 0.05)]
    rows = np.concatenate([plain, *odd, np.rint(plain * 100), plain * 1e-7, plain * 1e4]).astype(np.float32)
    assert (blocks.quantize(type, rows) == blocks.by_ggml(type, rows)).all()


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_compiler_makes_the_fast_code_and_without_one_ggml_does_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf_kernel, "_found", {})
    rows = weights(4, 512)
    fast = blocks.quantize("Q4_K", rows)
    assert [path.suffix for path in (tmp_path / "stillhouse").iterdir()] == [".so"]
    monkeypatch.setattr(gguf_kernel, "_found", {})
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert (blocks.quantize("Q4_K", rows) == fast).all() and gguf_kernel._found == {"Q4_K": None}
