"""ggml's types as candidates for a mix: what a matrix takes in each, and how it comes back."""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.ggml import dequantize, row_bytes
from .gguf_blocks import Floats, block_size, needs_importance, quantize
from .sensitivity import Candidate

TYPES = ("Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
"""From 3.4 to 8.5 bits. What is smaller loses more than a mix can make good; 16 bits are spent better elsewhere."""

_INPUT_BLOCKS = {"Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256, "IQ4_XS": 256}
"""ggml's processor kernels take inputs as Q8_K for these, and as Q8_0 or Q8_1, in blocks of 32, for all others."""

AFFINE = ("Q4_1", "Q5_1")  # with a least value a block, in 32 weights: large for what they give


def gguf_candidates(names: Sequence[str] = TYPES) -> list[Candidate]:
    """ggml's types by name, rendered by ggml itself."""
    return [_candidate(name) for name in names]


def _candidate(type: str) -> Candidate:
    def size(rows: int, cols: int) -> int | None:
        return None if cols % block_size(type) else rows * row_bytes(type, cols)

    def render(rows: Floats, importance: Floats | None) -> Floats:
        if importance is None and needs_importance(type):
            raise ValueError(f"{type} is not made without an importance matrix")
        return dequantize(type, quantize(type, rows, importance), rows.shape[1])

    return Candidate(type, size, render, _INPUT_BLOCKS.get(type, 32))
