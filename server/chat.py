"""`POST /v1/chat/completions`: OpenAI's chat, with the thoughts apart."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from ..r1.prompt import Prompt
from ..r1.split import State
from ..r1.thinking import Rules
from .model import ServedModel
from .reply import Ask, Piece, Replies
from .schema import ChatRequest
from .stream import DONE
from .surface import ask_for, check_model, logprob_json, usage_json

_STATES: dict[str, State] = {"open": "thinking", "closed": "answering", "unsaid": "undecided"}


def chat_ask(model: ServedModel, body: ChatRequest) -> Ask:
    """Render and encode a conversation. Slow for long ones: not for the event loop."""
    check_model(model, body.model)
    variables = dict(body.chat_template_kwargs or {})
    thinking = variables.pop("enable_thinking", None) is not False
    prompt: Prompt = model.template.render(
        [message.message() for message in body.messages], thinking=thinking, variables=variables
    )
    return ask_for(
        model,
        body,
        prompt.encode(model.vocabulary.encode, model.vocabulary.bos_id),
        _STATES[prompt.thinking],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        rules=Rules(stops=body.stops),
    )


async def chat_whole(model: ServedModel, replies: Replies) -> dict[str, Any]:
    """The reply in one object."""
    count = len(replies.thinking)
    texts = [{"reasoning": [], "answer": []} for _ in range(count)]
    logprobs = [{"reasoning": [], "answer": []} for _ in range(count)]
    ends: list[Piece | None] = [None] * count
    async for piece in replies.pieces():
        for delta in piece.deltas:
            texts[piece.index][delta.channel].append(delta.text)
        if piece.logprob:
            logprobs[piece.index][piece.channel].append(logprob_json(model, piece.logprob))
        if piece.finish:
            ends[piece.index] = piece
    choices = []
    for index, (text, logs, end) in enumerate(zip(texts, logprobs, ends, strict=True)):
        assert end is not None and end.outcome is not None
        reasoning, answer = "".join(text["reasoning"]), "".join(text["answer"])
        message: dict[str, Any] = {"role": "assistant", "content": answer if answer or not reasoning else None}
        if reasoning:
            message["reasoning_content"] = reasoning
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(logs) if any(logs.values()) else None,
                "finish_reason": end.finish,
                "reasoning_closed_by": end.outcome.closed_by,
            }
        )
    return _head(model, replies, "chat.completion") | {"choices": choices, "usage": usage_json(replies.usage)}


async def chat_events(model: ServedModel, replies: Replies, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """The reply as server-sent events: the role first, then what each token adds, the reason to end, the usage."""
    head = _head(model, replies, "chat.completion.chunk")
    if include_usage:
        head |= {"usage": None}  # as OpenAI has it: null in every chunk but the last
    start = json.dumps(head)[:-1].encode()
    for index in range(len(replies.thinking)):
        yield _event(start, {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
    async for piece in replies.pieces():
        for event in _piece_events(model, start, piece):
            yield event
    if include_usage:
        yield b"data: " + json.dumps(head | {"choices": [], "usage": usage_json(replies.usage)}).encode() + b"\n\n"
    yield DONE


def _piece_events(model: ServedModel, start: bytes, piece: Piece) -> list[bytes]:
    logs = None
    if piece.logprob:
        logs = _logprobs({"reasoning": [], "answer": []} | {piece.channel: [logprob_json(model, piece.logprob)]})
    events = []
    for delta in piece.deltas:
        field = "content" if delta.channel == "answer" else "reasoning_content"
        choice: dict[str, Any] = {"index": piece.index, "delta": {field: delta.text}, "finish_reason": None}
        if logs:  # told once, with the first delta of its token
            choice["logprobs"], logs = logs, None
        events.append(_event(start, choice))
    if piece.finish or logs:
        choice = {"index": piece.index, "delta": {}, "finish_reason": piece.finish}
        if logs:
            choice["logprobs"] = logs
        if piece.outcome:
            choice["reasoning_closed_by"] = piece.outcome.closed_by
        events.append(_event(start, choice))
    return events


def _event(start: bytes, choice: dict[str, Any]) -> bytes:
    return b"data: " + start + b', "choices": [' + json.dumps(choice).encode() + b"]}\n\n"


def _logprobs(logs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """`content` is the answer's, as OpenAI has it; the thoughts' are apart."""
    return {"content": logs["answer"], "reasoning": logs["reasoning"], "refusal": None}


def _head(model: ServedModel, replies: Replies, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{replies.id}", "object": kind, "created": replies.created, "model": model.name}
