"""What is asked: questions with an answer that can be checked, some to train on, others held out.

A task is a .jsonl or .parquet file with a prompt and an answer, or a generator of reasoning-gym. Nothing that is held
out is ever trained on: questions are compared by their text. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..r1.errors import UserError
from ..r1.messages import Message
from .config import TaskConfig

_FILES = (".jsonl", ".parquet")
_HELD_OUT_SEED = 1_000_003  # what a generator's seed is moved by for items that are held out
_DULL = 50  # repeated questions in a row after which a generator has no more


@dataclass(frozen=True, slots=True)
class Item:
    """One question, and everything that a reward may want to know of it."""

    id: str
    prompt: str | tuple[Mapping[str, str], ...]  # a text, or a conversation as a list of messages
    columns: Mapping[str, Any]  # answer and whatever else the row has

    @property
    def question(self) -> str:
        """The text that tells items apart."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Task:
    """Items to learn from and items to be measured with; no question is in both."""

    name: str
    train: Sequence[Item]
    held_out: Sequence[Item]
    overlap: int  # questions that were taken out of `train` because they are held out


def open_task(config: TaskConfig) -> Task:
    """Read or generate a task. Raises `UserError` with the file and row."""
    if config.name.endswith(_FILES):
        items = _distinct(read_items(Path(config.name)))
        if config.held_out:
            held_out = _distinct(read_items(Path(config.held_out)))[: config.held_out_size]
        else:
            held_out = sorted(items, key=lambda item: _mix(config.seed, item))[: config.held_out_size]
    else:
        held_out = _generate(config, config.seed + _HELD_OUT_SEED, config.held_out_size, set())
        questions = {item.question for item in held_out}
        items = _generate(config, config.seed, config.size, questions)
    questions = {item.question for item in held_out}
    train = [item for item in items if item.question not in questions][: config.size]
    if not train:
        raise UserError(
            f"{config.name} has {len(items)} different questions, and all of them are held out",
            "lower task.held_out_size, or add rows to a file, or widen a generator's options",
        )
    return Task(config.name, train, held_out, len(items) - len(train))


def messages(item: Item, config: TaskConfig) -> list[Message]:
    """The conversation that asks an item."""
    system = [Message("system", config.system)] if config.system else []
    if isinstance(item.prompt, str):
        text = f"{item.prompt}\n\n{config.instruction}" if config.instruction else item.prompt
        return [*system, Message("user", text)]
    return [*system, *(Message(turn["role"], turn["content"]) for turn in item.prompt)]


def read_items(path: Path) -> list[Item]:
    """Every row of a file, with its prompt. Raises `UserError` by row."""
    items: list[Item] = []
    for number, row in read_rows(path):
        prompt = row.get("prompt", row.get("question"))
        if isinstance(prompt, list):
            if not all(isinstance(it, dict) and {"role", "content"} <= it.keys() for it in prompt):
                raise UserError(f"{path}, row {number}: `prompt` is a list, but not of messages with role and content")
            prompt = tuple(prompt)
        if not isinstance(prompt, (str, tuple)) or not prompt:
            raise UserError(f"{path}, row {number} has no prompt", 'a row is {"prompt": "…", "answer": "…"}')
        columns = {key: value for key, value in row.items() if key not in ("prompt", "question")}
        if "answer" not in columns and "solution" in columns:
            columns["answer"] = columns["solution"]
        items.append(Item(str(row.get("id", number)), prompt, columns))
    return items


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a .jsonl or .parquet file with their numbers, from 1. Raises `UserError` by row."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), 1)
        return
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, row {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number} is not an object", 'a row is {"prompt": "…", "answer": "…"}')
        yield number, row


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"parquet files need pyarrow: {error}", "pip install pyarrow, or use .jsonl") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _generate(config: TaskConfig, seed: int, count: int, taken: set[str]) -> list[Item]:
    """Up to `count` different questions of a generator that are not taken; fewer where it has no more."""
    gym = _reasoning_gym()
    try:
        dataset = gym.create_dataset(config.name, seed=seed, size=count * 20 + 1000, **config.options)
    except (TypeError, ValueError, AssertionError) as error:
        if "not registered" in str(error):
            raise UserError(
                f"there is no task {config.name!r}",
                "a .jsonl or .parquet file, or a generator of reasoning-gym such as chain_sum, gcd, spell_backward",
            ) from None
        raise UserError(f"reasoning-gym's {config.name} refuses its options: {error}") from None
    items: list[Item] = []
    seen = set(taken)
    repeated = 0
    for index in range(len(dataset)):
        if len(items) == count or repeated == _DULL + len(items):
            break
        entry = dataset[index]
        if entry["question"] in seen:
            repeated += 1
            continue
        repeated = 0
        seen.add(entry["question"])
        columns = {"answer": entry["answer"], "entry": entry, "generator": config.name}
        items.append(Item(f"{config.name}-{seed}-{index}", entry["question"], columns))
    return items


def _distinct(items: list[Item]) -> list[Item]:
    return list({item.question: item for item in items}.values())


def _mix(seed: int, item: Item) -> str:
    return hashlib.sha256(f"{seed} {item.question}".encode()).hexdigest()


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"generated tasks need reasoning-gym: {error}", "pip install 'stillhouse[train]', or name a .jsonl file"
        ) from None
    return reasoning_gym
