"""What a plan comes to, in words: sizes, types, fallbacks, and what it takes to carry it out."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..r1.cache import size_text
from ..r1.clock import duration
from .gguf_blocks import Floats, quantize
from .plan import Entry, Plan
from .weights import Weights

HASH_BYTES_PER_S = 400e6  # SHA-256 without help from the processor; only for the estimate
SAMPLE_WEIGHTS = 1 << 17


def tell(weights: Weights, plans: Sequence[Plan], say: Callable[[str], None]) -> None:
    """What is there, and what will be made of it."""
    known = f", tokenizer {weights.vocabulary.pre} (by {weights.vocabulary.pre_by})" if weights.vocabulary else ""
    count = f"{weights.parameters / 1e9:.3f}e9 weights"
    say(f"{weights.name}: {weights.architecture}, {weights.blocks} blocks, {count}{known}")
    for plan in plans:
        types = Counter(entry.type for entry in plan.entries)
        predicted = json.loads(plan.metadata["stillhouse.recipe"])["predicted_kl"]
        say(f"{plan.path}: {size_text(plan.file_size)}, {plan.bits_per_weight:.2f} bits per weight")
        say("  types     " + ", ".join(f"{type} {count}" for type, count in types.most_common()))
        for line in misfit_lines(plan.misfits):
            say(f"  fallback  {line}")
        if predicted is not None:
            say(f"  loss      KL divergence {predicted:.4f} predicted")


def tell_needs(
    weights: Weights, plans: Sequence[Plan], importance: Mapping[str, Floats], memory: int, threads: int
) -> None:
    """What carrying the plans out takes."""
    disk = size_text(sum(plan.file_size for plan in plans))
    time_ = duration(seconds(weights, plans, importance, threads))
    print(f"takes {disk} of disk, {size_text(memory)} of memory, about {time_} with {threads} threads")


def misfit_lines(misfits: Sequence[Entry]) -> Iterator[str]:
    """Which types the shapes do not allow, and what is taken instead."""
    groups = Counter((entry.misfit, entry.type, entry.shape[-1]) for entry in misfits)
    for (wanted, given, cols), count in groups.most_common():
        yield f"{wanted} -> {given} in {count} tensors: their rows of {cols} are no multiple of {wanted}'s block"


def seconds(weights: Weights, plans: Sequence[Plan], importance: Mapping[str, Floats], threads: int) -> float:
    """How long it will take, from the speed of a few rows of each type."""
    total = sum(file.size for file in weights.files) / HASH_BYTES_PER_S
    rates: dict[str, float] = {}  # seconds a weight
    for index, tensor in enumerate(weights.tensors):
        for type in {plan.entries[index].type for plan in plans}:
            if type not in rates and len(tensor.shape) > 1:
                rows = tensor.read(0, max(1, min(tensor.matrix[0], SAMPLE_WEIGHTS // tensor.matrix[1])))
                quantize(type, rows[:1], importance.get(tensor.name))  # ggml makes its tables
                started = time.perf_counter()
                quantize(type, rows, importance.get(tensor.name))
                rates[type] = (time.perf_counter() - started) / rows.size
            total += tensor.size * rates.get(type, 0.0)
    return total / threads
