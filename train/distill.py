"""A larger model's right answers as data for a smaller one: ask any OpenAI-compatible server, keep what is right.

Rejection sampling as in DeepSeek-R1: several replies a prompt, those with a wrong answer or a broken form are dropped.
Thoughts that a server gives apart (`reasoning_content`) come back into `<think>`. Knows nothing of training.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..r1.errors import UserError
from ..r1.prompt import CLOSE, OPEN
from .config import RunConfig
from .rewards import Asked, Rewards
from .rollout import find_model, open_rollouts
from .tasks import Item, messages, open_task

_TIMEOUT_S = 600
_AT_ONCE = 8


class Distilled(NamedTuple):
    """What came of it."""

    prompts: int
    asked: int
    kept: int


class Teacher:
    """A chat model behind HTTP."""

    def __init__(self, url: str, model: str | None = None, key: str = "none") -> None:
        self._url, self._key = url.rstrip("/"), key
        self.model = model or self._call("/models", None)["data"][0]["id"]

    def reply(self, conversation: list[dict[str, str]], max_tokens: int, temperature: float, seed: int) -> str | None:
        """One whole reply as text, thoughts in tags; `None` where it was cut off."""
        body = {
            "model": self.model,
            "messages": conversation,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        choice = self._call("/chat/completions", body)["choices"][0]
        if choice.get("finish_reason") == "length":
            return None
        message = choice["message"]
        thoughts, content = message.get("reasoning_content") or message.get("reasoning"), message.get("content") or ""
        return f"{OPEN}\n{thoughts.strip()}\n{CLOSE}\n\n{content}" if thoughts else content

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise UserError(
                f"the teacher at {self._url} answers {error.code}: {error.read(300).decode(errors='replace')}"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"the teacher at {self._url} cannot be asked: {error}", "is it running? --teacher http://…/v1"
            ) from None


def distill(
    teacher: Teacher,
    items: Sequence[Item],
    config: RunConfig,
    samples: int,
    output: Path,
    report: Callable[[str], None],
) -> Distilled:
    """Ask every item `samples` times and write the right replies, one a line; shortest first where they are many.

    The file has `prompt` and `response` for `stillhouse train sft`, with the instruction left to it. What is there
    already is gone on from: its prompts are not asked again.
    """
    done = {json.loads(line)["id"] for line in _lines(output)}
    todo = [item for item in items if item.id not in done]
    judge = Rewards(config.rewards, config.gates)
    kept = asked = 0
    with output.open("a", encoding="utf-8") as file, ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, item in enumerate(todo, 1):
            conversation = [{"role": turn.role, "content": turn.content} for turn in messages(item, config.task)]

            def ask(seed: int, conversation: list[dict[str, str]] = conversation) -> str | None:
                settings = config.evaluation
                return teacher.reply(conversation, config.sft.max_tokens, settings.temperature, seed)

            replies = [text for text in pool.map(ask, range(samples)) if text]
            asked += samples
            right = _right(judge, item, replies, config.sft.max_tokens)
            for text in sorted(set(right), key=len):
                kept += 1
                row = {"id": item.id, "prompt": item.prompt, "response": text, "teacher": teacher.model}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if number % 10 == 0 or number == len(todo):
                report(f"{number}/{len(todo)} prompts, {kept} right replies")
    return Distilled(len(todo), asked, kept)


def sift(
    config: RunConfig, run: Path | None, items: int, samples: int, output: Path, report: Callable[[str], None]
) -> Distilled:
    """A run's own right replies, drawn by the engine, as data for `sft` (DeepSeek-R1's third stage)."""
    paths, _ = find_model(config.model.name)
    asked = list(open_task(config.task).train[:items])
    rollouts = open_rollouts(paths, config.rollout, config.grpo.max_tokens)
    try:
        rollouts.use(run / "adapter.gguf" if run else None)
        asking = [rollouts.ask(messages(item, config.task)) for item in asked]
        seeds = [f"{config.seed} sift {n}" for n in range(len(asked))]
        report(f"{len(asked)} prompts, {samples} replies each")
        drawn = rollouts.draw(
            [it.ids for it in asking],
            samples,
            config.grpo.max_tokens,
            seeds,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
        )
    finally:
        rollouts.close()
    judge = Rewards(config.rewards, config.gates)
    rows: list[str] = []
    for item, it, replies in zip(asked, asking, drawn, strict=True):
        whole = [it.prefix + reply.text for reply in replies if not reply.truncated]
        for text in sorted(set(_right(judge, item, whole, config.grpo.max_tokens)), key=len):
            rows.append(json.dumps({"id": item.id, "prompt": item.prompt, "response": text}, ensure_ascii=False) + "\n")
    output.write_text("".join(rows), encoding="utf-8")
    return Distilled(len(asked), len(asked) * samples, len(rows))


def _right(judge: Rewards, item: Item, replies: list[str], max_tokens: int) -> list[str]:
    """The replies with the right answer; where a format is rewarded, those in it."""
    if not replies:
        return []
    count = len(replies)
    scored = judge(
        Asked(
            [item.prompt] * count,
            replies,
            [[]] * count,
            [item.columns] * count,
            [item.id] * count,
            [""] * count,
            [False] * count,
            max_tokens,
        )
    )
    wanted = [name for name in ("accuracy", "format") if name in scored.parts]
    return [text for n, text in enumerate(replies) if all((scored.parts[name][n] or 0.0) >= 1.0 for name in wanted)]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
