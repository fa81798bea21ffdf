"""What a run is: one TOML file over one preset, checked before anything is loaded.

`RunConfig` is the reference: every table and key, its unit and its default. Knows nothing of PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from ..r1.catalog import BASE_MODEL
from ..r1.errors import UserError

INSTRUCTION = "Think step by step inside <think></think>, then give only the final answer inside <answer></answer>."


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The base model."""

    name: str = BASE_MODEL  # anything `stillhouse serve` takes that is a GGUF
    dtype: Literal["f32", "bf16"] = "f32"  # that frozen weights are multiplied in
    weights: Literal["packed", "f16", "expanded"] = "packed"  # how they stay in memory: as in the file, or as numbers
    device: str = "auto"  # cpu, cuda, mps; auto: what there is
    checkpointing: bool = False  # recompute activations: less memory, a third more time


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The adapter."""

    rank: int = 16
    alpha: float = 32.0  # the change counts alpha / rank times
    start: str = ""  # the folder of a run to go on from: its cold start, say


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """What is asked."""

    name: str = "chain_sum"  # a generator of reasoning-gym, or a .jsonl or .parquet file
    options: Mapping[str, Any] = field(default_factory=dict)  # of the generator
    seed: int = 1  # of the generator
    size: int = 10_000  # items to train on, at most
    held_out: str = ""  # a file of its own; without it, items that are kept apart
    held_out_size: int = 200
    instruction: str = INSTRUCTION  # stands behind every question
    system: str = ""  # a system message


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    """Group relative policy optimization."""

    steps: int = 50
    group: int = 8  # replies to one prompt
    prompts: int = 8  # that a step learns from
    max_tokens: int = 96  # of a reply
    loss: str = "dr_grpo"
    normalisation: Literal["group", "batch", "none", "rloo"] = "none"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    dual_clip: float = 0.0  # 0 = off
    beta: float = 0.0  # weight of the KL towards the base model
    kl: Literal["k1", "k2", "k3", "k3_corrected"] = "k3"
    updates: int = 1  # optimizer steps on one batch of rollouts
    dynamic_sampling: bool = True  # ask more prompts in place of groups whose replies all got the same
    refills: int = 3  # at most so often
    truncated: Literal["learn", "mask", "penalise"] = "learn"  # what becomes of replies that were cut off
    curriculum: bool = False  # prefer prompts that are solved now and then
    token_budget: int = 512  # of a micro-batch: fewer take less memory


@dataclass(frozen=True, slots=True)
class SftConfig:
    """Supervised fine-tuning."""

    epochs: int = 2
    batch: int = 16  # replies an optimizer step
    token_budget: int = 640  # of a micro-batch: fewer take less memory
    max_tokens: int = 1024  # longer examples are left out
    minutes: float = 0.0  # stop after so long; 0 = no limit


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0  # the gradient's norm is held under this
    warmup: int = 5  # steps
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to a tenth


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How replies are drawn."""

    engine: Literal["llama.cpp", "pytorch", "auto"] = "llama.cpp"  # pytorch: the live module; auto: try both
    weights: Literal["auto", "f16", "bf16", "f32", "served"] = "auto"  # auto: f16 up to a billion, else served
    temperature: float = 1.0
    top_p: float = 1.0  # less would draw from another distribution than the one that is trained
    correction: Literal["auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "auto"
    cap: float = 2.0
    floor: float = 0.5
    kl_stop: float = 0.0  # engine and trainer differ by more: stop; 0 = by the type of the weights
    prompt_tokens: int = 0  # room for a prompt; 0 = for the longest there is
    parallel: int = 32  # replies in progress at once
    threads: int = 0  # of the engine and of PyTorch; 0 = OMP_NUM_THREADS, or else the physical cores


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """Held-out items, before, during and after."""

    every: int = 10  # steps; 0 = only before and after
    items: int = 100
    samples: int = 1  # replies an item
    temperature: float = 0.6  # what R1 is measured with
    top_p: float = 0.95


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """When to go back to the best checkpoint; 0 = never."""

    entropy: float = 0.02  # nats a token, less than this
    kl: float = 0.0  # from the base model a token, more than this; costs a forward pass
    length: float = 3.0  # replies so many times as long as at the start
    truncated: float = 0.95  # more than this share of the replies cut off stops the run
    strikes: int = 3  # steps in a row


@dataclass(frozen=True, slots=True)
class SaveConfig:
    """Checkpoints."""

    every: int = 10  # steps, of sft and of grpo
    keep: int = 2  # besides the best
    tensorboard: bool = False  # write its files, too, into tensorboard/


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A whole run."""

    out: str = "run1"  # folder
    seed: int = 0
    preset: str = "local"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: Mapping[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 0.2})  # weights
    gates: Mapping[str, str] = field(default_factory=dict)  # this one counts only where that one is above 0
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    save: SaveConfig = field(default_factory=SaveConfig)


_R1 = {  # DeepSeek-R1 (2501.12948 v2), first stage
    "grpo": {
        "loss": "grpo",
        "normalisation": "group",
        "group": 16,
        "prompts": 32,
        "beta": 0.001,
        "epsilon_low": 10.0,
        "epsilon_high": 10.0,
        "dynamic_sampling": False,
        "max_tokens": 8192,
    },
    "optimizer": {"lr": 3e-6},
    "rewards": {"accuracy": 1.0, "format": 1.0, "language": 1.0},
}
PRESETS: dict[str, dict[str, Any]] = {
    "local": {},  # what the defaults are made for: a small model on one machine
    "r1": _R1,
    "r1-stage2": {**_R1, "rollout": {"temperature": 0.7}},
    "dapo": {
        "grpo": {"loss": "dapo", "normalisation": "group", "group": 16, "truncated": "mask"},
        "rewards": {"accuracy": 1.0, "overlong": 1.0},
    },
}


def load_config(path: Path | None = None, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's TOML over its preset, `changes` ("grpo.steps": 3) over both. Raises `UserError` by key."""
    table = read_toml(path) if path is not None else {}
    for key, value in (changes or {}).items():
        place = table
        *above, last = key.split(".")
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    preset = table.get("preset", "local")
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}", f"one of {', '.join(PRESETS)}")
    config = _build(RunConfig, _over(PRESETS[preset], table), "")
    _check(config)
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a table. Raises `UserError`."""
    try:
        return _toml().loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def dump_config(config: RunConfig) -> str:
    """The configuration as TOML, every key; `load_config` reads it back the same."""
    plain, tables = [], []
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            tables += _table(key, value)
        else:
            plain.append(f"{key} = {_value(value)}")
    return "\n".join([*plain, *tables]) + "\n"


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables as one. What is asked for as a whole (rewards, options) replaces, the rest is merged."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        whole = key in ("rewards", "gates", "options")
        merged[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) and not whole else value
    return merged


def _build(kind: type, table: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            near = get_close_matches(key, hints, 1)
            raise UserError(
                f"there is no setting `{where}{key}`",
                f"did you mean `{where}{near[0]}`?" if near else f"there are {', '.join(hints)}",
            )
        values[key] = _fit(hints[key], value, where + key)
    return kind(**values)


def _fit(hint: Any, value: Any, name: str) -> Any:
    """A value as its field wants it, or a `UserError` that says what it wants."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"`{name}` is a table", f"write [{name}] and its settings below")
        return _build(typing.cast(type, hint), value, f"{name}.")
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in inner:
            raise UserError(f"`{name}` cannot be {value!r}", f"one of {', '.join(map(str, inner))}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        return tuple(_fit(one, it, name) for one, it in zip(inner, value, strict=True))
    if origin not in (None, tuple, types.UnionType):  # Mapping
        if isinstance(value, dict):
            return {str(key): _fit(inner[1], it, f"{name}.{key}") for key, it in value.items()}
        raise UserError(f"`{name}` is a table", f"write [{name}] and its entries below")
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        wanted = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(hint, "a list")
        raise UserError(f"`{name}` is {value!r} and has to be {wanted}")
    return value


def _check(config: RunConfig) -> None:
    """What no type says."""
    grpo, rollout = config.grpo, config.rollout
    losses = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "luspo", "vespo", "rloo", "reinforce")
    if grpo.loss not in losses:
        raise UserError(f"there is no loss {grpo.loss!r}", f"one of {', '.join(losses)}")
    if grpo.loss in ("rloo", "reinforce") and grpo.updates > 1:
        raise UserError(f"{grpo.loss} has no ratio and takes one update a rollout", "set grpo.updates = 1")
    if rollout.top_p != 1.0:
        raise UserError(
            f"rollout.top_p = {rollout.top_p} would draw from another distribution than the one that is trained",
            "leave it at 1.0; it may be changed for serving",
        )
    if rollout.temperature != 1.0 and rollout.correction not in ("auto", "none"):
        raise UserError(
            f"rollout.correction needs log-probabilities of temperature 1, and the replies are drawn at "
            f"{rollout.temperature}",
            'set rollout.temperature = 1.0 or rollout.correction = "none"',
        )
    positive = {
        "grpo.steps": grpo.steps,
        "grpo.prompts": grpo.prompts,
        "grpo.max_tokens": grpo.max_tokens,
        "grpo.updates": grpo.updates,
        "lora.rank": config.lora.rank,
        "optimizer.lr": config.optimizer.lr,
        "rollout.temperature": rollout.temperature,
        "rollout.parallel": rollout.parallel,
        "sft.epochs": config.sft.epochs,
        "save.every": config.save.every,
        "sft.batch": config.sft.batch,
        "task.size": config.task.size,
    }
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f"`{name}` is {value} and has to be more than 0")
    if grpo.group < 2:
        raise UserError(f"`grpo.group` is {grpo.group}: a reply is compared with others", "2 or more; 8 is usual")
    if not any(config.rewards.values()):
        raise UserError("no reward has a weight", "[rewards] with accuracy = 1.0, say")
    for name, gate in config.gates.items():
        if not {name, gate} <= config.rewards.keys():
            raise UserError(f"the gate `{name} = {gate!r}` names a reward that is not in [rewards]")


def _table(name: str, table: Mapping[str, Any]) -> list[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = ["", f"[{name}]", *(f"{_key(k)} = {_value(v)}" for k, v in table.items() if k not in inner)]
    for key, value in inner.items():
        lines += _table(f"{name}.{_key(key)}", value)
    return lines


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli
    except ImportError as error:
        raise UserError(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} needs tomli: {error}", "pip install tomli"
        ) from None
    return tomli
