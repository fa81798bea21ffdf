"""A model of half a megabyte, a task and rewards for it, and what two runs are compared by."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stillhouse.train.config import RunConfig, load_config

REWARD = """
def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]

def nothing(completions, **_):
    return [0.0 for _ in completions]
"""


@pytest.fixture(scope="module")
def toy(random_model, tmp_path_factory) -> Path:
    """A folder with a model, a task and a reward."""
    folder = tmp_path_factory.mktemp("toy")
    random_model.write_model(folder / "toy.gguf", kv_heads=1, norm=0.5)
    rows = [{"id": f"q{n}", "prompt": f"say {n}", "answer": str(n)} for n in range(12)]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return folder


@pytest.fixture
def configure(toy, tmp_path) -> Callable[..., RunConfig]:
    def configure(**changes) -> RunConfig:
        given = {
            "out": str(tmp_path / "run"),
            "model.name": str(toy / "toy.gguf"),
            "task.name": str(toy / "task.jsonl"),
            "task.held_out_size": 4,
            "task.instruction": "",
            "lora.rank": 4,
            "lora.alpha": 8.0,
            "grpo.steps": 4,
            "grpo.prompts": 2,
            "grpo.group": 4,
            "grpo.max_tokens": 8,
            "optimizer.lr": 1e-2,
            "optimizer.warmup": 0,
            "rollout.weights": "f32",
            "rollout.threads": 1,
            "rollout.prompt_tokens": 64,
            "evaluation.every": 0,
            "evaluation.items": 2,
            "save.every": 2,
            "guard.length": 0.0,
            "guard.truncated": 0.0,
            "rewards": {f"{toy}/reward.py:vowels": 1.0},
        }
        return load_config(changes=given | changes)

    return configure


def quiet(_: str) -> None:
    pass


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without times and memory."""
    return [
        {key: value for key, value in record.items() if key != "seconds" and not key.endswith(("_s", "_gb"))}
        for record in records
    ]


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """No file can grow over `size` bytes: the kernel refuses, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
