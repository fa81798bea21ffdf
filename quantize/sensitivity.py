"""How much of a model is lost where: a price in KL divergence and in bytes for every matrix in every candidate type.

Near the model's own weights, the mean KL divergence of model against quantized is half the sum of F dW^2 over all
weights, where dW is the error and F the diagonal of the Fisher information: F = E_t[g^2 x^2], with x the matrix's input
at position t and g the gradient at its output of -log p(y), for y drawn from the model itself. dW is the real one: rows
are rendered in the type and read back. Where a type's kernel rounds its inputs, the matrix pays for that as well. It
knows arrays only; `pytorch_sensitivity` gets F from a checkpoint.
Source: the second-order expansion of KL, as in Martens, "New insights and perspectives on the natural gradient method".
Shapes: a matrix has O rows (its outputs) and I columns (its inputs).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..r1.errors import UserError

Floats = NDArray[np.float32]

ROWS = 128  # of a matrix are rendered; more make the price of a matrix less noisy and take longer
_FORMAT = "stillhouse.sensitivity.1"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A type that a matrix may be given."""

    name: str  # "Q4_K"
    size: Callable[[int, int], int | None]  # rows and columns to bytes; None = it cannot take rows so long
    render: Callable[[Floats, Floats | None], Floats]  # rows (R, I) and importance (I,) to rows as they are read back
    input_block: int = 0  # its kernel rounds inputs to 8 bits in blocks of so many; 0 = it does not


class Cost(NamedTuple):
    """What a matrix costs in a type."""

    kl: float  # predicted, nats a token
    error: float  # squared error of its outputs, summed over them, a token
    bytes: int


Costs = Mapping[str, Mapping[str, Cost]]  # GGUF name -> type -> cost


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The price list of a model."""

    costs: dict[str, dict[str, Cost]]
    model: str  # whose
    text: str  # what was read, in words
    tokens: int  # that were scored

    def of_types(self, names: Sequence[str]) -> Costs:
        """The same for some of the types only; a matrix that can take none of them keeps all."""
        return {
            tensor: {name: cost for name, cost in types.items() if name in names} or types
            for tensor, types in self.costs.items()
        }


class Sample(NamedTuple):
    """Rows that stand for all of a matrix."""

    rows: NDArray[np.intp]  # (R,), ascending
    weights: Floats  # (R,) for how many rows each stands


def sample_rows(mass: NDArray[np.floating], count: int, random: np.random.Generator) -> Sample:
    """Choose about `count` rows, the likelier the more mass (O,) they have, so that weighted sums stay unbiased.

    Where no more rows have mass than `count`, all of them. Systematic sampling with unequal probabilities; the sum over
    the sample of weight times value estimates the sum over all rows (Horvitz and Thompson 1952).
    """
    mass = np.asarray(mass, np.float64)
    rows = np.flatnonzero(mass > 0)
    if len(rows) <= count:
        return Sample(rows, np.ones(len(rows), np.float32))
    chance = np.zeros(len(rows))
    free, left = np.ones(len(rows), bool), float(count)
    while True:  # rows that are certain to be chosen leave their share to the others
        chance[free] = left * mass[rows][free] / mass[rows][free].sum()
        certain = free & (chance >= 1)
        if not certain.any():
            break
        chance[certain] = 1
        free &= ~certain
        left -= certain.sum()
    ends = np.floor(np.concatenate([[0], np.cumsum(chance)]) + random.random())
    chosen = np.diff(ends) > 0
    return Sample(rows[chosen], (1 / chance[chosen]).astype(np.float32))


def price(
    weights: Floats,
    fisher: Floats,
    sample: Sample,
    shape: tuple[int, int],
    candidates: Sequence[Candidate],
    *,
    importance: Floats | None,
    second_moments: Floats,
    rounding: Mapping[int, float],
) -> dict[str, Cost]:
    """What a matrix (O, I) costs in each candidate type that can take it.

    `weights` and `fisher` are of the sampled rows (R, I), `fisher` a token; `importance` (I,) is what the quantizer is
    given, `second_moments` (I,) the mean of x^2, `rounding` what inputs of 8 bits cost, by the length of their blocks.
    """
    found = {}
    for candidate in candidates:
        size = candidate.size(*shape)
        if size is None:
            continue
        squares = (candidate.render(weights, importance) - weights) ** 2  # (R, I)
        kl = 0.5 * np.einsum("r,ri,ri->", sample.weights, fisher, squares, dtype=np.float64, casting="same_kind")
        error = np.einsum("r,ri,i->", sample.weights, squares, second_moments, dtype=np.float64, casting="same_kind")
        found[candidate.name] = Cost(float(kl) + rounding.get(candidate.input_block, 0.0), float(error), size)
    return found


def refuse_other(found: Sensitivity, matrices: Collection[str]) -> None:
    """A price list is for one model: it has to name its matrices, and no others. Raises `UserError`."""
    strange = sorted(found.costs.keys() ^ set(matrices))
    if strange:
        raise UserError(
            f"the price list is of {found.model}: {strange[0]} is in one of the two only",
            "it was made for another model: name another file with --sensitivity, and it is made",
        )


def write(path: Path, found: Sensitivity) -> None:
    """Keep a price list, so that every budget reuses it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"format": _FORMAT, **asdict(found)}, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> Sensitivity:
    """Read a price list again. Raises `UserError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != _FORMAT:
            raise ValueError("it is of another version")
        prices = {n: {t: Cost(*cost) for t, cost in types.items()} for n, types in found.pop("costs").items()}
        return Sensitivity(prices, **found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a sensitivity file: {error}", "delete it: it is made again") from None
