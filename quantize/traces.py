"""Reasoning traces in a model's own words, to calibrate it with: prompts in, one line of JSON a reply out.

The model is loaded and asked as a server does it, through the same engine and the same prompts. What is written is
flushed reply by reply, and a run that was interrupted goes on behind the last whole line. It knows no weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.base import GenerationRequest, Sampling
from ..backends.engine import Engine
from ..backends.open import Opened
from ..r1.errors import UserError
from ..r1.messages import Message
from ..r1.prompt import OPEN, ChatTemplate
from .calibration import Texts


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for."""

    count: int  # traces; prompts are asked again, with another seed, where there are fewer
    max_tokens: int  # of a reply, its thoughts included
    temperature: float
    top_p: float
    seed: int


def write_traces(
    opened: Opened, prompts: Texts, wish: Wish, path: Path, progress: Callable[[int], None] = lambda _: None
) -> int:
    """Have a model answer, appending to `path`; how many traces were written now."""
    done = finished(path)
    vocabulary = opened.backend.vocabulary
    template = ChatTemplate(opened.chat_template, vocabulary.control, bos=opened.begin_text, eos=opened.end_text)
    asked: dict[str, _Asked] = {}
    for number in (number for number in range(wish.count) if number not in done):
        messages = _question(prompts, number)
        prompt = template.render(messages)
        ids = prompt.encode(vocabulary.encode, vocabulary.bos_id)
        sampling = Sampling(temperature=wish.temperature, top_p=wish.top_p, seed=wish.seed + number)
        room = opened.backend.context_length - len(ids)
        if room < 1:
            raise UserError(f"prompt {number} of {prompts.name} has {len(ids)} tokens", "give a larger --context")
        request = GenerationRequest(str(number), ids, min(wish.max_tokens, room), sampling)
        begun = f"{OPEN}\n" if prompt.thinking == "open" else ""
        asked[request.id] = _Asked(number, messages, request, begun)
    engine = Engine(opened.backend)
    try:
        with path.open("a", encoding="utf-8") as file:
            for line in _replies(engine, asked):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                progress(1)
    finally:
        engine.close()
    return len(asked)


def finished(path: Path) -> set[int]:
    """The numbers of the traces that a file has; half a line at its end is cut off."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    try:
        return {int(json.loads(line)["number"]) for line in whole.decode().splitlines()}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has other lines than traces in it", "name another file with -o") from None


@dataclass(slots=True)
class _Asked:
    number: int
    messages: tuple[Message, ...]
    request: GenerationRequest
    text: str  # of the reply, as far as it has come


def _question(prompts: Texts, number: int) -> tuple[Message, ...]:
    """A conversation up to where the assistant is to speak."""
    sample = prompts.samples[number % len(prompts.samples)]
    if not sample.messages:
        return (Message("user", sample.text),)
    return sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages


def _replies(engine: Engine, asked: dict[str, _Asked]) -> Iterator[dict[str, Any]]:
    """Each reply as a line, as soon as it is whole."""
    counts = dict.fromkeys(asked, 0)
    for token in engine.generate([one.request for one in asked.values()]):
        one = asked[token.request_id]
        one.text += token.text
        counts[token.request_id] += 1
        if token.finish:
            spoken = [{"role": m.role, "content": m.content} for m in one.messages]
            spoken.append({"role": "assistant", "content": one.text})
            yield {"number": one.number, "messages": spoken, "finish": token.finish, "tokens": counts[token.request_id]}
