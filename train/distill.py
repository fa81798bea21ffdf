"""A larger model's right answers as data for a smaller one: ask any OpenAI-compatible server, keep what is right.

Rejection sampling as in DeepSeek-R1: several replies a prompt, those with a wrong answer or a broken form are dropped.
Thoughts that a server gives apart (`reasoning_content`) come back into `<think>`. Knows nothing of training.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..r1.clock import duration
from ..r1.errors import UserError
from ..r1.prompt import CLOSE, OPEN
from .config import RunConfig
from .jsonl import as_line
from .rewards import Asked, Rewards
from .rollout import find_model, open_rollouts
from .tasks import Item, messages, open_task

_TIMEOUT_S = 600
_AT_ONCE = 8
_PORTION = 32  # prompts; what a stopped harvest draws again at most


class Distilled(NamedTuple):
    """What came of it."""

    prompts: int
    asked: int
    kept: int


class Teacher:
    """A chat model behind HTTP."""

    def __init__(self, url: str, model: str | None = None, key: str = "none") -> None:
        self._url, self._key = url.rstrip("/"), key
        self.model = model or self._of(self._call("/models", None), "data", 0, "id")

    def reply(self, conversation: list[dict[str, str]], max_tokens: int, temperature: float, seed: int) -> str | None:
        """One whole reply as text, thoughts in tags; `None` where it was cut off."""
        body = {
            "model": self.model,
            "messages": conversation,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        choice = self._of(self._call("/chat/completions", body), "choices", 0)
        if choice.get("finish_reason") == "length":
            return None
        message = self._of(choice, "message")
        thoughts, content = message.get("reasoning_content") or message.get("reasoning"), message.get("content") or ""
        return f"{OPEN}\n{thoughts.strip()}\n{CLOSE}\n\n{content}" if thoughts else content

    def _of(self, answer: Any, *keys: str | int) -> Any:
        """What lies under some keys. Raises `UserError` where the server speaks another language."""
        try:
            for key in keys:
                answer = answer[key]
        except (LookupError, TypeError):
            words = f"the teacher at {self._url} does not answer as OpenAI's servers do: it has no {keys[0]!r}"
            raise UserError(words, "name its /v1; with --teacher-model the model") from None
        return answer

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


class Collection:
    """Rows of a file by the item they answer, and beside it what was asked: who is stopped goes on from there."""

    def __init__(self, path: Path) -> None:
        """Find what is there already. Raises `UserError` for a file of something else."""
        self._path, self._told = path, path.with_name(path.name + ".asked")
        rows = _read(path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or "id" not in row:
                raise UserError(f"{path}, row {number} has no id: it is something else", "choose another --out")
        told = path.exists() and self._told.exists()
        self.asked: set[str] = set(_read(self._told)) if told else {row["id"] for row in rows}
        kept = [row for row in rows if row["id"] in self.asked]  # stopped between an item's rows and its mark
        self.count = len(kept)
        with _writing(path):
            for file, lines in ((self._told, sorted(self.asked)), (path, kept)):
                partial = file.with_name(file.name + ".partial")
                partial.write_text("".join(map(as_line, lines)), encoding="utf-8")
                os.replace(partial, file)

    def add(self, item: Item, replies: Sequence[str], **columns: str) -> None:
        """Write an item's right replies, the shortest first, and that it was asked."""
        rows = [{"id": item.id, "prompt": item.prompt, "response": text, **columns} for text in replies]
        with _writing(self._path):
            for file, lines in ((self._path, rows), (self._told, [item.id])):
                with file.open("a", encoding="utf-8") as end:
                    end.write("".join(map(as_line, lines)))
                    end.flush()
                    os.fsync(end.fileno())
        self.asked.add(item.id)
        self.count += len(rows)


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
    judge = Rewards(config.rewards, config.gates)
    collection = Collection(output)
    before, started = collection.count, time.monotonic()
    todo = [item for item in items if item.id not in collection.asked]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, item in enumerate(todo, 1):
            conversation = [{"role": turn.role, "content": turn.content} for turn in messages(item, config.task)]

            def ask(seed: int, conversation: list[dict[str, str]] = conversation) -> str | None:
                settings = config.evaluation
                return teacher.reply(conversation, config.sft.max_tokens, settings.temperature, seed)

            replies = [text for text in pool.map(ask, range(samples)) if text]
            collection.add(item, _right(judge, item, replies, config.sft.max_tokens), teacher=teacher.model)
            if number % 10 == 0 or number == len(todo):
                report(_progress(number, len(todo), collection.count - before, started))
    return Distilled(len(todo), len(todo) * samples, collection.count - before)


def sift(
    config: RunConfig, run: Path | None, items: int, samples: int, output: Path, report: Callable[[str], None]
) -> Distilled:
    """A run's own right replies, drawn by the engine, as data for `sft` (DeepSeek-R1's third stage)."""
    paths, _ = find_model(config.model.name)
    judge = Rewards(config.rewards, config.gates)
    asked = list(open_task(config.task).train[:items])
    collection = Collection(output)
    started, drawn_now = time.monotonic(), 0
    report(f"{len(asked)} prompts, {samples} replies each")
    rollouts = open_rollouts(paths, config.rollout, config.grpo.max_tokens)
    try:
        for begin in range(0, len(asked), _PORTION):
            portion = asked[begin : begin + _PORTION]
            if all(item.id in collection.asked for item in portion):
                continue
            rollouts.use(run / "adapter.gguf" if run else None)  # and an empty cache, whatever was drawn before
            asking = [rollouts.ask(messages(item, config.task)) for item in portion]
            drawn = rollouts.draw(
                [it.ids for it in asking],
                samples,
                config.grpo.max_tokens,
                [f"{config.seed} sift {begin + n}" for n in range(len(portion))],
                temperature=config.evaluation.temperature,
                top_p=config.evaluation.top_p,
            )
            for item, it, replies in zip(portion, asking, drawn, strict=True):
                if item.id not in collection.asked:
                    whole = [it.prefix + reply.text for reply in replies if not reply.truncated]
                    collection.add(item, _right(judge, item, whole, config.grpo.max_tokens))
            drawn_now += len(portion)
            left = len(asked) - begin - len(portion)
            report(_progress(drawn_now, drawn_now + left, collection.count, started))
    finally:
        rollouts.close()
    return Distilled(len(asked), len(asked) * samples, collection.count)


def _progress(done: int, total: int, kept: int, started: float) -> str:
    left = (time.monotonic() - started) / done * (total - done)
    return f"{done}/{total} prompts, {kept} right replies" + (f", about {duration(left)} left" if done < total else "")


def _right(judge: Rewards, item: Item, replies: list[str], max_tokens: int) -> list[str]:
    """The different replies with the right answer, shortest first; where a format is rewarded, those in it."""
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
    right = {text for n, text in enumerate(replies) if all((scored.parts[name][n] or 0.0) >= 1.0 for name in wanted)}
    return sorted(right, key=lambda text: (len(text), text))


def _read(path: Path) -> list[Any]:
    """The lines of a file; without the last where it was not written to its end. Raises `UserError` by row."""
    found: list[Any] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, row {number} is not JSON: {error}", "choose another --out") from None
    return found


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "make room; the same command goes on from what is there"
        raise UserError(f"{path} cannot be written: {error.strerror}", hint) from None
