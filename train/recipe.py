"""Several stages as one: R1's own way is a cold start, reasoning, rejection sampling, once more from its harvest.

    out = "r1-small"
    [common.task]                 what all stages share: any setting of a run
    name = "chain_sum"

    [[stage]]
    name = "cold"
    kind = "sft"
    data = "traces.jsonl"

    [[stage]]
    name = "reason"
    kind = "grpo"
    set = { "grpo.steps" = 50 }   what is different here

    [[stage]]
    name = "harvest"
    kind = "sift"                 right replies of the stage before, as data
    samples = 4

    [[stage]]
    name = "again"
    kind = "sft"
    data = "harvest"              of that stage
    start = "base"                not from the stage before

Every stage has a folder of its own in `out`, starts from the adapter of the stage before unless it says otherwise, and
is left out once it is done: a recipe that was stopped goes on in the middle of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..r1.errors import UserError
from .config import RunConfig, load_config, read_toml

Kind = Literal["sft", "grpo", "sift"]
_DONE, _DATA = "done", "data.jsonl"
_KEYS = ("name", "kind", "data", "start", "samples", "items", "set")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a recipe."""

    name: str
    kind: Kind
    data: str = ""  # sft: a file, or the name of a stage that sifts
    start: str = ""  # a stage's name, "base", or nothing for the stage before
    samples: int = 4  # sift: replies a prompt
    items: int = 500  # sift: prompts
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Stages in their order, and what they share."""

    out: Path
    common: Mapping[str, Any]  # "task.name": "chain_sum"
    stages: tuple[Stage, ...]


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe, every stage's settings too. Raises `UserError`."""
    table = read_toml(path)
    rows = table.get("stage")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} has no [[stage]]", "see the head of train/recipe.py, or docs/training.md")
    stages: list[Stage] = []
    for number, row in enumerate(rows, 1):
        stages.append(_stage(path, number, row, stages))
    recipe = Recipe(Path(table.get("out", path.stem)), _flat(table.get("common", {})), tuple(stages))
    for stage in recipe.stages:
        config_of(recipe, stage, "")
    return recipe


def config_of(recipe: Recipe, stage: Stage, start: str) -> RunConfig:
    """The run of one stage."""
    place = {"out": str(recipe.out / stage.name), "lora.start": start}
    return load_config(changes={**recipe.common, **stage.changes, **place})


def run_recipe(recipe: Recipe, report: Callable[[str], None], *, anyway: bool = False) -> Path:
    """Run what is left of a recipe; the folder of its last adapter. Raises `UserError`."""
    trained: dict[str, str] = {"base": ""}
    last = ""
    for stage in recipe.stages:
        folder = recipe.out / stage.name
        start = trained[stage.start] if stage.start else last
        config = config_of(recipe, stage, start)
        if not (folder / _DONE).exists():
            report(f"stage {stage.name} ({stage.kind}), from {start or 'the base model'}")
            _run(recipe, stage, config, start, report, anyway)
            (folder / _DONE).write_text("", encoding="utf-8")
        if stage.kind != "sift":
            last = trained[stage.name] = str(folder)
    return Path(last)


def _run(
    recipe: Recipe, stage: Stage, config: RunConfig, start: str, report: Callable[[str], None], anyway: bool
) -> None:
    folder = recipe.out / stage.name
    resume = (folder / "config.toml").exists()
    if stage.kind == "grpo":
        from .grpo import run_grpo

        run_grpo(config, resume=resume, anyway=anyway, report=report)
    elif stage.kind == "sft":
        from .sft import run_sft

        sifted = recipe.out / stage.data / _DATA
        run_sft(config, sifted if sifted.exists() else Path(stage.data), report, resume=resume)
    else:
        from .distill import sift

        folder.mkdir(parents=True, exist_ok=True)
        done = sift(config, Path(start) if start else None, stage.items, stage.samples, folder / _DATA, report)
        report(f"{done.kept} right replies of {done.asked}, for {done.prompts} prompts")


def _stage(path: Path, number: int, row: Any, before: list[Stage]) -> Stage:
    where = f"{path}, stage {number}"
    if not isinstance(row, dict) or not {"name", "kind"} <= row.keys():
        raise UserError(f"{where} has no name or no kind")
    if unknown := row.keys() - set(_KEYS):
        raise UserError(f"{where}: there is no {min(unknown)!r}", f"there are {', '.join(_KEYS)}")
    if row["kind"] not in get_args(Kind):
        raise UserError(f"{where} cannot be {row['kind']!r}", f"one of {', '.join(get_args(Kind))}")
    if row["kind"] == "sft" and not row.get("data"):
        raise UserError(f"{where} has no data to learn", "a file, or the name of a stage that sifts")
    names = {it.name for it in before}
    if row["name"] in names:
        raise UserError(f"{where} has the name of another: {row['name']}")
    start = row.get("start", "")
    if start not in {"", "base", *(it.name for it in before if it.kind != "sift")}:
        raise UserError(f"{where} starts from {start!r}, and no stage before it has an adapter of that name")
    fields = {key: value for key, value in row.items() if key != "set"}
    return Stage(**fields, changes=_flat(row.get("set", {})))


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"grpo": {"steps": 3}} -> {"grpo.steps": 3}; what is one setting stays one."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{above}{key}"
        whole = name.rpartition(".")[2] in ("options", "rewards", "gates")
        if isinstance(value, dict) and not whole:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat
