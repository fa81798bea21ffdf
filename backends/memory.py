"""What fits into memory before anything is loaded: weights, the KV cache of all replies, an allowance for the rest.

The numbers are handed in, so that one rule holds for RAM, for a GPU and for what a Mac lets its GPU keep. Knows nothing
of any runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..r1.errors import UserError
from .base import LoadOptions

_MOST_DEFAULT_CONTEXT = 32_768  # DeepSeek's longest reply; a model's own 131,072 would cost gigabytes that few use
_LEAST_CONTEXT = 512


class Fit(NamedTuple):
    """The context and the KV cache that a model gets."""

    context: int  # tokens a request may have
    cache_tokens: int  # tokens of all requests together
    partitioned: bool  # every place in the batch has a whole context of its own; else all share what there is


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes; bytes, unless said otherwise."""

    weights: int
    per_token: float  # of the KV cache
    context_length: int = 0  # tokens that it was trained to read, 0 where nothing says it
    allowance: float = 0.05  # of the weights, for activations and scratch buffers: reckoned, not measured
    less: str = ""  # how its KV cache could be smaller: "with --kv-type q8_0 (half as much)"


def fit(need: Need, free: int, options: LoadOptions, *, where: str = "memory") -> Fit:
    """Choose the context and the KV cache for `free` bytes, or say why what was asked for cannot be had."""
    trained = need.context_length or _MOST_DEFAULT_CONTEXT
    if options.context and options.context > trained:
        raise UserError(
            f"--context {options.context} is more than the {trained} tokens this model was trained to read",
            f"serve with --context {trained} or less",
        )
    per_token = max(1, need.per_token)
    budget = int(free - need.weights * (1 + need.allowance))
    if budget < _LEAST_CONTEXT * per_token:
        raise UserError(
            f"the model needs {_gb(need.weights)} of {where} and {_gb(free)} are free",
            "close other programs, or choose a smaller model or quantization",
        )
    most = int(budget // per_token)
    asked = max(options.context or 0, options.cache_tokens or 0)
    if asked > most:
        raise UserError(
            f"a KV cache for {asked} tokens needs {_gb(asked * per_token)} of {where} and {_gb(budget)} are free "
            "beside the weights",
            f"serve with --{'context' if options.context == asked else 'cache-tokens'} {most // 256 * 256} or less"
            + (f", or {need.less}" if need.less else ""),
        )
    context = options.context or min(trained, _MOST_DEFAULT_CONTEXT)
    while context > max(_LEAST_CONTEXT, most):
        context //= 2
    shared = max(context, min(options.parallel * context, _MOST_DEFAULT_CONTEXT, most // 4))
    cells = max(context, options.cache_tokens or shared)
    return Fit(context, cells, partitioned=cells >= options.parallel * context)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
