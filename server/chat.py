"""`POST /v1/chat/completions`: OpenAI's chat, with the thoughts apart."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, Literal

from ..backends.base import FinishReason
from ..r1.messages import CallDelta, Channel, Message, ToolCall
from ..r1.prompt import Prompt, answer_of
from ..r1.split import State
from ..r1.thinking import Outcome, Rules
from ..r1.tools import told_in_prompt
from .errors import ApiError
from .model import ServedModel
from .next_turn import read_ahead
from .reply import Ask, Piece, Replies
from .schema import ChatRequest
from .stream import DONE
from .surface import ask_for, check_calls, check_model, form_of, logprob_json, usage_json
from .upstream_model import AnyModel, UpstreamModel, upstream_chat_ask

_HOLE = "\0"  # where a frame takes its text
_STATES: dict[str, State] = {"open": "thinking", "closed": "answering", "unsaid": "undecided"}


def chat_ask(model: AnyModel, body: ChatRequest) -> Ask:
    """Render and encode a conversation. Slow for long ones: not for the event loop."""
    check_model(model, body.model)
    if isinstance(model, UpstreamModel):
        check_calls(body)
        return upstream_chat_ask(model, body)
    messages = [message.message() for message in body.messages]
    check_calls(body)
    variables = {name: value for name, value in (body.chat_template_kwargs or {}).items() if name != "enable_thinking"}
    prompt = _prompt(
        model,
        body,
        messages,
        thinking=body.budget != 0,
        preserve_thinking=bool(body.preserve_thinking),
        variables=variables,
    )
    resumed = messages[-1].role == "assistant"
    form = form_of(model, body)
    begun = answer_of(messages[-1]) if form and resumed else ""
    if form and begun and not form.start().take_text(begun):
        raise ApiError(
            400, "messages: the last one begins an answer that is not of the form asked for", param="messages"
        )
    return ask_for(
        model,
        body,
        prompt.encode(model.vocabulary.encode, model.vocabulary.bos_id),
        _STATES[prompt.thinking],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        rules=Rules(
            budget=body.budget,
            reserve=body.answer_reserve_tokens,
            min_tokens=body.min_thinking_tokens or 0,
            guard_bypass=not resumed,
            break_loops=body.break_loops is not False,
            want_answer=body.empty_answer != "allow",
            inline=body.reasoning_format == "inline",
            stops=body.stops,
            stop_scope=body.stop_scope or "answer",
            penalty_scope=body.penalty_scope or "answer",
        ),
        form=form,
        begun=begun,
        calls=model.call_format if body.tool_use else None,
    )


def _prompt(model: ServedModel, body: ChatRequest, messages: Sequence[Message], **options: Any) -> Prompt:
    """A conversation as the model reads it, the tools in the way it knows or else in words."""
    use, form = body.tool_use, model.call_format
    if form.name == "prompted":
        return model.template.render(told_in_prompt(messages, use, form), **options)
    return model.template.render(messages, tools=[tool.json for tool in use.tools] if use else (), **options)


async def chat_whole(model: AnyModel, body: ChatRequest, replies: Replies) -> dict[str, Any]:
    """The reply in one object."""
    shape = _Shape(model, body, replies, "chat.completion")
    gathered = [_Gathered() for _ in replies.thinking]
    async for piece in replies.pieces():
        gathered[piece.choice].add(piece, model)
    choices = []
    for index, reply in enumerate(gathered):
        assert reply.finish is not None and reply.outcome is not None
        reasoning, answer = "".join(reply.texts["reasoning"]), "".join(reply.texts["answer"])
        told = shape.fields("reasoning", reasoning) if reasoning else {}
        content = told.pop("content", "") + answer
        message = {"role": "assistant", "content": content if content or not (reasoning or reply.calls) else None}
        calls = {"tool_calls": [_call_json(call) for call in reply.calls]} if reply.calls else {}
        choices.append(
            {
                "index": index,
                "message": message | told | calls,
                "logprobs": _logprobs(reply.logprobs) if any(reply.logprobs.values()) else None,
                "finish_reason": reply.finish,
                "reasoning_closed_by": reply.outcome.closed_by,
            }
        )
    _read_ahead(model, body, replies, gathered[0])
    return shape.head | {"choices": choices, "usage": usage_json(replies.usage)}


async def chat_events(model: AnyModel, body: ChatRequest, replies: Replies) -> AsyncGenerator[bytes, None]:
    """The reply as server-sent events: the role first, then what each token adds, the reason to end, the usage."""
    shape = _Shape(model, body, replies, "chat.completion.chunk")
    first = _Gathered()
    for index in range(len(replies.thinking)):
        yield shape.event({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
    async for piece in replies.pieces():
        if piece.choice == 0:
            first.add(piece, None)
        for event in shape.piece_events(piece):
            yield event
    if shape.include_usage:
        yield shape.usage_event(replies)
    _read_ahead(model, body, replies, first)
    yield DONE


class _Shape:
    """How this request wants its reply written."""

    def __init__(self, model: AnyModel, body: ChatRequest, replies: Replies, kind: str) -> None:
        self.include_usage = bool(body.stream and body.stream_options and body.stream_options.include_usage)
        self._model = model
        self._format = body.reasoning_format or "reasoning_content"
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{replies.id}",
            "object": kind,
            "created": replies.created,
            "model": model.name,
        }
        if replies.thinking_limit:
            tokens, by = replies.thinking_limit
            asked = body.budget
            self.head["thinking_limit"] = {"tokens": tokens, "by": by, "clamped": asked is not None and tokens < asked}
        if self.include_usage:
            self.head["usage"] = None  # as OpenAI has it: null in every chunk but the last
        self._frames: dict[tuple[int, Channel], list[bytes]] = {}
        self._start = b"data: " + json.dumps(self.head)[:-1].encode() + b', "choices": ['

    def event(self, choice: dict[str, Any]) -> bytes:
        """One chunk with one choice. What is the same in every chunk is encoded once."""
        return self._start + json.dumps(choice).encode() + b"]}\n\n"

    def usage_event(self, replies: Replies) -> bytes:
        """The chunk without choices that OpenAI sends last."""
        chunk = self.head | {"choices": [], "usage": usage_json(replies.usage)}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    def fields(self, channel: Channel, text: str) -> dict[str, str]:
        """The fields of a message or delta that carry a text; none where thoughts are hidden."""
        if channel == "answer" or self._format == "inline":
            return {"content": text}
        match self._format:
            case "hidden":
                return {}
            case "both":
                return {"reasoning_content": text, "reasoning": text}
            case name:
                return {name: text}

    def piece_events(self, piece: Piece) -> list[bytes]:
        """The chunks of one token: one for each channel it has text in, one for the end."""
        logs = None
        is_told = piece.channel == "answer" or self._format != "hidden"
        if piece.logprob and is_told and isinstance(self._model, ServedModel):
            entries: dict[Channel, list[dict[str, Any]]] = {"reasoning": [], "answer": []}
            entries[piece.channel].append(logprob_json(self._model, piece.logprob))
            logs = _logprobs(entries)
        events = []
        for delta in piece.deltas:
            if not logs:
                if event := self._text_event(piece.choice, delta.channel, delta.text):
                    events.append(event)
            elif fields := self.fields(delta.channel, delta.text):
                choice: dict[str, Any] = {"index": piece.choice, "delta": fields, "finish_reason": None}
                choice["logprobs"], logs = logs, None  # told once, with the first delta of its token
                events.append(self.event(choice))
        if piece.calls:
            delta = {"tool_calls": [_call_delta_json(call) for call in piece.calls]}
            events.append(self.event({"index": piece.choice, "delta": delta, "finish_reason": None}))
        if piece.finish or logs:
            choice = {"index": piece.choice, "delta": {}, "finish_reason": piece.finish}
            if logs:
                choice["logprobs"] = logs
            if piece.outcome:
                choice["reasoning_closed_by"] = piece.outcome.closed_by
            events.append(self.event(choice))
        return events

    def _text_event(self, choice: int, channel: Channel, text: str) -> bytes:
        """The chunk of a delta that is nothing but text; b"" where it is hidden. Only the text is new each time."""
        frame = self._frames.get((choice, channel))
        if frame is None:
            fields = self.fields(channel, _HOLE)
            chunk = self.event({"index": choice, "delta": fields, "finish_reason": None}) if fields else b""
            frame = self._frames[choice, channel] = chunk.split(json.dumps(_HOLE).encode())
        return json.dumps(text).encode().join(frame)


class _Gathered:
    """One reply, as far as it has come."""

    def __init__(self) -> None:
        self.texts: dict[Channel, list[str]] = {"reasoning": [], "answer": []}
        self.logprobs: dict[Channel, list[dict[str, Any]]] = {"reasoning": [], "answer": []}
        self.calls: list[ToolCall] = []
        self.finish: FinishReason | Literal["tool_calls"] | None = None
        self.outcome: Outcome | None = None

    def add(self, piece: Piece, model: AnyModel | None) -> None:
        """Take one token's piece; its log-probability only where a model is given to name the token."""
        for delta in piece.deltas:
            self.texts[delta.channel].append(delta.text)
        if piece.logprob and isinstance(model, ServedModel):
            self.logprobs[piece.channel].append(logprob_json(model, piece.logprob))
        for call in piece.calls:
            if call.name is not None:
                self.calls.append(ToolCall(call.id or "", call.name, ""))
            self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + call.arguments)
        self.finish, self.outcome = piece.finish, piece.outcome


def _read_ahead(model: AnyModel, body: ChatRequest, replies: Replies, reply: _Gathered) -> None:
    """Read the next turn ahead where its prompt will be another: this reply's thoughts will be left out of it."""
    thought = reply.outcome is not None and reply.outcome.reasoning_tokens > 0
    if not isinstance(model, ServedModel) or not thought or body.preserve_thinking or body.reasoning_format == "inline":
        return
    if reply.calls and reply.finish == "length":
        return  # cut inside a call, perhaps
    messages = [message.message() for message in body.messages]
    if messages[-1].role != "assistant":  # resumed: what the client will send back is its own affair
        messages.append(Message("assistant", "".join(reply.texts["answer"]), calls=tuple(reply.calls)))
        read_ahead(model, lambda: _prompt(model, body, messages, reply_follows=False), replies.id)


def _call_json(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta_json(call: CallDelta) -> dict[str, Any]:
    """A piece of a call: the first has its name, as OpenAI's clients expect."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _logprobs(logs: dict[Channel, list[dict[str, Any]]]) -> dict[str, Any]:
    """`content` is the answer's, as OpenAI has it; the thoughts' are apart."""
    return {"content": logs["answer"], "reasoning": logs["reasoning"], "refusal": None}
