"""What a conversation is made of, and what a reply is made of. Plain data; knows nothing of JSON or of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Channel = Literal["reasoning", "answer"]
ClosedBy = Literal["model", "budget", "reserve", "loop", "user", "length", "eos", "stop"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called."""

    id: str
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as the caller sent it."""

    role: str
    content: str
    reasoning: str | None = None  # thoughts that came with an assistant's turn, if the caller sent them apart
    name: str | None = None
    calls: tuple[ToolCall, ...] = ()  # of an assistant's turn
    call_id: str | None = None  # of a tool's turn: whose result it is


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply: text of one channel only."""

    channel: Channel
    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a tool call: the first has its id and its name, the others more of its arguments."""

    index: int  # which of the reply's calls, from 0
    arguments: str
    id: str | None = None
    name: str | None = None
