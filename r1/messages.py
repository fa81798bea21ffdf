"""What a conversation is made of, and what a reply is made of. Plain data; knows nothing of JSON or of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Channel = Literal["reasoning", "answer"]
ClosedBy = Literal["model", "budget", "reserve", "loop", "user", "length", "eos", "stop"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as the caller sent it."""

    role: str
    content: str
    reasoning: str | None = None  # thoughts that came with an assistant's turn, if the caller sent them apart
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply: text of one channel only."""

    channel: Channel
    text: str
