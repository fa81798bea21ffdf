"""May a checkpoint be divided among so many ranks, and how? Told before anything is started or loaded.

Reads what the checkpoint says of itself; knows nothing of hosts and of runtimes.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..r1.errors import UserError
from .checkpoint import ARCHITECTURES, Checkpoint

Strategy = Literal["single", "tensor", "pipeline"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
MOST_RANKS = 64


def strategies(checkpoint: Checkpoint, ranks: int) -> dict[Strategy, str | None]:
    """Every way to share a checkpoint among ranks, and why it can't be; `None` = it can."""
    name = checkpoint.folder.name
    if checkpoint.model_type not in ARCHITECTURES:
        return dict.fromkeys(STRATEGIES, f"{name} brings its own program, which no rank of a cluster runs")
    layers = checkpoint.config["num_hidden_layers"]
    can = degrees(checkpoint)
    return {
        "single": None if ranks == 1 else f"{ranks} ranks are not a single one",
        "tensor": None
        if ranks in can
        else f"{_shape(checkpoint)} can't be divided among {ranks} ranks; they can among {_listed(can)}",
        "pipeline": None if ranks <= layers else f"{layers} layers can't be divided among {ranks} ranks",
    }


def check_split(checkpoint: Checkpoint, strategy: Strategy, ranks: int) -> None:
    """Raise `UserError` with the way out where these ranks can't share this checkpoint in this way."""
    able = strategies(checkpoint, ranks)
    if (reason := able[strategy]) is not None:
        others = [other for other, why in able.items() if why is None]
        way_out = f"take another number of hosts, or --strategy {' or '.join([*others, 'replicas'])}"
        raise UserError(f"{checkpoint.folder.name}: {reason}", way_out)


def degrees(checkpoint: Checkpoint) -> list[int]:
    """The numbers of ranks among which every layer can be divided."""
    heads, kv_heads, attended, forward = _sizes(checkpoint.config)
    group = _group(checkpoint.config)
    return [
        ranks
        for ranks in range(1, min(kv_heads, MOST_RANKS) + 1)
        if not (heads % ranks or kv_heads % ranks or attended % (ranks * group) or forward % (ranks * group))
    ]


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    heads: int = config["num_attention_heads"]
    head: int = config.get("head_dim") or config["hidden_size"] // heads
    return heads, config.get("num_key_value_heads") or heads, heads * head, config.get("intermediate_size") or 0


def _group(config: dict[str, Any]) -> int:
    """Neighbouring weights that have a scale in common, and so stay together; 1 where nothing is quantized."""
    told = config.get("quantization")
    if not isinstance(told, dict):
        return 1
    own = [layer.get("group_size", 0) for layer in told.values() if isinstance(layer, dict)]
    return max([told.get("group_size", 64), *own])


def _shape(checkpoint: Checkpoint) -> str:
    heads, kv_heads, _, forward = _sizes(checkpoint.config)
    group = _group(checkpoint.config)
    groups = f" in groups of {group}" if group > 1 else ""
    return f"{heads} heads, {kv_heads} KV heads and {forward} columns{groups}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
