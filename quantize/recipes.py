"""Which tensor gets which type: llama.cpp's own mixes, overrides by name, and what takes the place of a misfit.

A recipe is a name such as Q4_K_M. Its rules are llama.cpp's (src/llama-quant.cpp, without mixtures of experts), so that
a file made here has the types of one made by `llama-quantize`; the tests compare. Nothing here reads a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..r1.errors import UserError
from ..r1.gguf import FILE_TYPES, TENSOR_TYPES
from .gguf_blocks import block_size
from .weights import FLOATS, Tensor, Weights

Assignment = dict[str, str]  # GGUF tensor name -> type

RECIPES = {  # name -> the type of most tensors
    **{
        name: name
        for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS")
    },
    **{"Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K"},
    **{"Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K"},
    **{"IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S"},
    **{"IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S"},
    **{"IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M"},
}
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q3_K": "Q3_K_M"}
NUMBERS = {name: number for number, name in FILE_TYPES.items()}  # general.file_type

MISFITS = {  # a type of 256 weights a block -> one of 32
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
NEED_IMPORTANCE = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
_TINY = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M")
_part = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class Choice:
    """A type for every tensor."""

    types: Assignment
    misfits: Assignment  # what a tensor would have had, were its rows a multiple of the block


def find_recipe(name: str) -> str:
    """A recipe as users write it. Raises `UserError`."""
    wanted = name.strip().upper()
    wanted = ALIASES.get(wanted, wanted)
    if wanted not in RECIPES:
        raise UserError(
            f"there is no type {name!r}", f"one of {', '.join(RECIPES)}, mlx-4bit, nf4; Q4_K_M suits most machines"
        )
    return wanted


def is_quantizable(tensor: Tensor) -> bool:
    """Whether a recipe has a say in a tensor: matrices of weights are, norms and biases stay as they are."""
    return len(tensor.shape) > 1 and tensor.name.endswith("weight") and not tensor.name.endswith("_norm.weight")


def assign(
    recipe: str, weights: Weights, overrides: Sequence[tuple[str, str]] = (), *, has_importance: bool = False
) -> Choice:
    """The types that llama.cpp's mix of this name gives, where no override (regular expression, type) says another."""
    base = RECIPES[recipe]
    values = [t.name for t in weights.tensors if t.name.endswith("attn_v.weight")]
    is_tied = all(tensor.name != "output.weight" for tensor in weights.tensors)
    wanted: Assignment = {}
    for tensor in weights.tensors:
        forced = next((type for pattern, type in overrides if re.search(pattern, tensor.name)), None)
        if not is_quantizable(tensor):
            continue
        if base in FLOATS and forced is None:
            wanted[tensor.name] = base
        elif forced is not None:
            wanted[tensor.name] = forced
        elif tensor.name == "output.weight" or (is_tied and tensor.name == "token_embd.weight"):
            wanted[tensor.name] = _output_type(recipe, base, tensor.matrix[1])
        elif tensor.name == "token_embd.weight":
            wanted[tensor.name] = _embedding_type(recipe, base)
        else:
            wanted[tensor.name] = _block_type(recipe, base, tensor.name, weights, values, has_importance)
    return fitted(weights, wanted)


def fitted(weights: Weights, wanted: Assignment) -> Choice:
    """Types that the shapes allow; what `wanted` does not name keeps its own, vectors in full."""
    types: Assignment = {}
    misfits: Assignment = {}
    for tensor in weights.tensors:
        type = wanted.get(tensor.name) or ("F32" if weights.vocabulary or tensor.type not in FLOATS else tensor.type)
        types[tensor.name] = fitting(type, tensor.matrix[1])
        if types[tensor.name] != type:
            misfits[tensor.name] = type
    return Choice(types, misfits)


def fitting(type: str, cols: int) -> str:
    """The type itself where rows of `cols` weights can have it, else what llama.cpp takes instead.

    >>> fitting("Q4_K", 1024), fitting("Q4_K", 576), fitting("Q4_0", 100)
    ('Q4_K', 'Q5_0', 'F16')
    """
    for candidate in (type, MISFITS.get(type, type)):
        if cols % block_size(candidate) == 0:
            return candidate
    return "F16"


def lacking_importance(types: Assignment, recipe: str, known: Iterable[str]) -> list[str]:
    """Tensors whose type is garbage without an importance matrix, and for which there is none."""
    needing = (*NEED_IMPORTANCE, "Q2_K") if recipe == "Q2_K_S" else NEED_IMPORTANCE
    there = {*known, "token_embd.weight", "output.weight"}
    return [name for name, type in types.items() if type in needing and name not in there]


def parse_override(text: str) -> tuple[str, str]:
    """`REGEX=TYPE` as a pair. Raises `UserError`."""
    pattern, _, type = text.rpartition("=")
    type = type.upper()
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}", "such as 'ffn_down=Q6_K'") from None
    if not pattern or type not in {name for name, _, _ in TENSOR_TYPES.values()}:
        raise UserError(f"{text!r} is not REGEX=TYPE", "such as 'ffn_down=Q6_K'; types are Q4_K, Q6_K, Q8_0, F16, …")
    return pattern, type


def _output_type(recipe: str, base: str, cols: int) -> str:
    if cols % block_size(base):
        return "Q8_0"
    if recipe in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M"):
        return "Q5_K"
    return base if base == "Q8_0" else "Q6_K"


def _embedding_type(recipe: str, base: str) -> str:
    if recipe in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return "Q2_K"
    return "IQ3_S" if recipe in ("IQ2_S", "IQ2_M", "IQ3_XXS") else base


def _more_bits(i: int, n: int) -> bool:
    """llama.cpp's choice of blocks that are worth more: the first and last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _block_type(recipe: str, base: str, name: str, weights: Weights, values: list[str], has_importance: bool) -> str:
    found = _part.fullmatch(name)
    if not found:
        return base
    i, part, n = int(found[1]), found[2], weights.blocks
    gqa = weights.heads // max(weights.kv_heads, 1)
    if part == "attn_v":
        type = _value_type(recipe, base, values.index(name), len(values), gqa, has_importance)
        is_70b = n == 80 and (weights.architecture == "qwen2" or gqa > 1)
        return "Q5_K" if is_70b and type in ("Q3_K", "Q4_K") and recipe not in _TINY else type
    if part == "ffn_down":
        return _down_type(recipe, base, i, n, has_importance)
    if part == "attn_output":
        changed = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "Q2_K": "Q3_K"}
        changed |= {"IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return changed.get(recipe, base)
    if part in ("attn_q", "attn_k"):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(recipe, base)
    if part in ("ffn_gate", "ffn_up") and recipe == "IQ3_XS" and n // 8 <= i < 7 * n // 8:
        return "IQ3_XXS"
    return base


def _value_type(recipe: str, base: str, i: int, n: int, gqa: int, has_importance: bool) -> str:
    is_shared = gqa >= 4  # by so many heads that more bits cost little
    if recipe in _TINY:
        return "Q4_K" if is_shared else "IQ3_S" if recipe in ("IQ2_S", "IQ2_M") else "Q2_K"
    if recipe == "Q2_K":
        return "Q4_K" if is_shared else "Q3_K"
    if recipe == "IQ3_XXS":
        return "Q4_K" if is_shared else "IQ3_XXS" if has_importance else "IQ3_S"
    if recipe in ("Q2_K_S", "IQ3_XS", "IQ3_S"):
        return "Q4_K" if is_shared else base
    if recipe in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if is_shared else base
    if recipe in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(i, n) else base
    if recipe == "Q3_K_M":
        return "Q5_K" if i < 2 else "Q4_K"
    if recipe == "Q4_K_S":
        return "Q5_K" if i < 4 else base
    return {"IQ3_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(recipe, base)


def _down_type(recipe: str, base: str, i: int, n: int, has_importance: bool) -> str:
    is_early = i < n // 8
    if recipe in _TINY:
        return ("IQ3_S" if recipe in ("IQ2_S", "IQ2_M") else "Q2_K") if is_early else base
    if recipe in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(i, n) else base
    if recipe == "Q3_K_M":
        return "Q5_K" if i < n // 16 else "Q4_K"
    if recipe == "IQ3_XXS" and not has_importance:
        return "Q4_K" if is_early else "Q3_K"
    if recipe in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if is_early and not has_importance else base
    if recipe in ("Q4_0", "Q5_0"):  # an importance matrix drives them wild in the first blocks
        return base.replace("_0", "_1") if is_early and has_importance else base
    if is_early and recipe in ("Q2_K_S", "IQ3_M", "Q4_K_S"):
        return "Q5_K" if recipe == "Q4_K_S" else "Q4_K"
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(recipe, base)
