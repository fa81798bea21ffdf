"""`POST /v1/completions`: text goes on. The prompt is the caller's own: control tokens in it count as such."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from ..r1.thinking import Rules
from .errors import ApiError
from .model import ServedModel
from .reply import Ask, LogProb, Piece, Replies
from .schema import CompletionRequest
from .stream import DONE
from .surface import ask_for, check_model, finite, token_text, usage_json
from .upstream_model import AnyModel, UpstreamModel, upstream_completion_ask

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_RULES = {"break_loops": False, "reserve": 0}  # raw text has no thoughts to look after


def completion_ask(model: AnyModel, body: CompletionRequest) -> Ask:
    """Encode the prompt. Slow for long ones: not for the event loop."""
    check_model(model, body.model)
    if isinstance(model, UpstreamModel):
        return upstream_completion_ask(model, body, body.max_tokens or _DEFAULT_MAX_TOKENS)
    prompt_ids = _prompt_ids(model, body)
    return ask_for(
        model,
        body,
        prompt_ids,
        "answering",
        max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
        top_logprobs=body.logprobs,
        rules=Rules(stops=body.stops, **_RULES),
    )


async def completion_whole(model: AnyModel, body: CompletionRequest, replies: Replies) -> dict[str, Any]:
    """The reply in one object."""
    count = len(replies.thinking)
    texts: list[list[str]] = [[_echoed(model, body)] for _ in range(count)]
    logs: list[list[LogProb]] = [[] for _ in range(count)]
    finishes: list[str | None] = [None] * count
    async for piece in replies.pieces():
        texts[piece.choice].extend(delta.text for delta in piece.deltas)
        if piece.logprob:
            logs[piece.choice].append(piece.logprob)
        finishes[piece.choice] = piece.finish or finishes[piece.choice]
    choices = [
        {"index": i, "text": "".join(texts[i]), "logprobs": _logprobs(model, logs[i], 0), "finish_reason": finishes[i]}
        for i in range(count)
    ]
    return _head(model, replies) | {"choices": choices, "usage": usage_json(replies.usage)}


async def completion_events(model: AnyModel, body: CompletionRequest, replies: Replies) -> AsyncGenerator[bytes, None]:
    """The reply as server-sent events."""
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = _head(model, replies) | ({"usage": None} if include_usage else {})
    lengths = [0] * len(replies.thinking)  # characters sent, for text_offset
    for index in range(len(lengths)):
        if echoed := _echoed(model, body):
            yield _event(head, {"index": index, "text": echoed, "logprobs": None, "finish_reason": None})
    async for piece in replies.pieces():
        text = "".join(delta.text for delta in piece.deltas)
        if text or piece.finish or piece.logprob:
            yield _event(head, _choice(model, piece, text, lengths[piece.choice]))
            lengths[piece.choice] += len(text)
    if include_usage:
        yield b"data: " + json.dumps(head | {"choices": [], "usage": usage_json(replies.usage)}).encode() + b"\n\n"
    yield DONE


def _choice(model: AnyModel, piece: Piece, text: str, offset: int) -> dict[str, Any]:
    logs = _logprobs(model, [piece.logprob] if piece.logprob else [], offset)
    return {"index": piece.choice, "text": text, "logprobs": logs, "finish_reason": piece.finish}


def _prompt_ids(model: ServedModel, body: CompletionRequest) -> list[int]:
    prompt = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise ApiError(400, f"prompt: one prompt a request; these are {len(prompt)}", param="prompt")
        prompt = prompt[0]  # type: ignore[assignment]
    vocabulary = model.vocabulary
    if isinstance(prompt, str):
        ids = vocabulary.encode(prompt)
        return ids if vocabulary.bos_id is None or ids[:1] == [vocabulary.bos_id] else [vocabulary.bos_id, *ids]
    for token_id in prompt:
        if not isinstance(token_id, int) or not 0 <= token_id < vocabulary.size:
            raise ApiError(
                400, f"prompt: {token_id!r} is not a token id; they go from 0 to {vocabulary.size - 1}", param="prompt"
            )
    return list(prompt)  # type: ignore[arg-type]


def _echoed(model: AnyModel, body: CompletionRequest) -> str:
    if not body.echo:
        return ""
    prompt = body.prompt[0] if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else body.prompt
    if isinstance(prompt, str):
        return prompt
    assert isinstance(model, ServedModel), "upstreams are asked for texts only"
    return b"".join(model.vocabulary.piece(token_id) for token_id in prompt).decode(errors="replace")  # type: ignore[arg-type]


def _logprobs(model: AnyModel, entries: list[LogProb], offset: int) -> dict[str, Any] | None:
    if not entries or not isinstance(model, ServedModel):
        return None
    tokens = [token_text(model, entry.token_id) for entry in entries]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [finite(entry.logprob) for entry in entries],
        "top_logprobs": [{token_text(model, i): finite(p) for i, p in entry.top} for entry in entries],
        "text_offset": offsets,
    }


def _event(head: dict[str, Any], choice: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(head | {"choices": [choice]}).encode() + b"\n\n"


def _head(model: AnyModel, replies: Replies) -> dict[str, Any]:
    return {
        "id": f"cmpl-{replies.id}",
        "object": "text_completion",
        "created": replies.created,
        "model": model.name,
    }
