"""What a request may say: OpenAI's fields, ours, and their limits. Unknown fields are accepted and ignored.

Fields that we know and cannot honour are refused by name (`others.py` has those of other servers): a client that asks
for audio must not get prose.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..r1.messages import Message, ToolCall
from .fields import Count, Fields, Many, Name, Seed, at_most
from .forms import FormFields, ToolFields
from .others import refuse

_MOST_STOPS, _LONGEST_STOP = 16, 1000


class TextPart(Fields):
    """A part of a message's content; text is the only kind there is."""

    type: str
    text: str | None = None


class CalledFunction(Fields):
    """`tool_calls[].function` of an earlier turn."""

    name: Name
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, arguments: str) -> str:
        try:
            is_object = isinstance(json.loads(arguments or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ValueError("a call's arguments are a JSON object, written as a string")
        return arguments or "{}"


class MadeCall(Fields):
    """`tool_calls[]` of an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Fields):
    """One message as clients send it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Many[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Many[MadeCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content")
    @classmethod
    def _text_only(cls, content: str | list[TextPart] | None) -> str | list[TextPart] | None:
        for part in content if isinstance(content, list) else ():
            if part.type not in ("text", "input_text", "output_text"):
                raise ValueError(f"this model reads text only; a part of type {part.type!r} can't be given to it")
            if part.text is None:
                raise ValueError("a part of type 'text' needs a field 'text'")
        return content

    def message(self) -> Message:
        """As the floors below know it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text or "" for p in self.content or ())
        thoughts = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in self.tool_calls or ())
        role = "system" if self.role == "developer" else self.role
        return Message(role, content, thoughts, self.name, calls, self.tool_call_id)


class StreamOptions(Fields):
    """`stream_options`."""

    include_usage: bool | None = None


class SamplingFields(Fields):
    """What chat and text completions have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None  # llama.cpp's and Ollama's name for it
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    penalty_last_n: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Field(ge=1, le=100)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=0, le=10_000)] | None = None
    dry_penalty_last_n: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: str | Many[str] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, at_most(1024)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > _MOST_STOPS:
            raise ValueError(f"at most {_MOST_STOPS} stop strings; these are {len(stops)}")
        if any(not text or len(text) > _LONGEST_STOP for text in stops):
            raise ValueError(f"a stop string has 1 to {_LONGEST_STOP} characters")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token_id in bias or ():
            if not token_id.isascii() or not token_id.isdigit() or len(token_id) > 9:
                raise ValueError(f"{token_id[:20]!r} is not a token id; /tokenize tells them")
        return bias

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


ReasoningFormat = Literal["reasoning_content", "reasoning", "both", "inline", "hidden"]
Effort = Literal["none", "minimal", "low", "medium", "high"]


class ReasoningFields(Fields):
    """What a request wants of the model's thoughts. Counts are tokens."""

    reasoning_format: ReasoningFormat | None = None  # where the thoughts are told
    thinking_budget: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None  # thoughts end here at the latest
    reasoning_effort: Effort | None = None  # a budget by name
    answer_reserve_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None  # kept free for the answer
    min_thinking_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_scope: Literal["answer", "all"] | None = None  # None = answer
    penalty_scope: Literal["answer", "all"] | None = None  # None = answer
    preserve_thinking: bool | None = None  # keep the thoughts of earlier turns in the prompt
    empty_answer: Literal["close", "allow"] | None = None  # what an end inside the thoughts does
    break_loops: bool | None = None
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str | None] | None, at_most(256)] = None

    @model_validator(mode="after")
    def _agree(self) -> ReasoningFields:
        budget = self.budget
        if budget is not None and (self.min_thinking_tokens or 0) > budget:
            raise ValueError(f"min_thinking_tokens: {self.min_thinking_tokens} is more than the budget of {budget}")
        return self

    @property
    def budget(self) -> int | None:
        """The budget that holds: by number, by template switch, or by effort; `None` = no limit but the reserve."""
        if self.thinking_budget is not None:
            return self.thinking_budget
        if (self.chat_template_kwargs or {}).get("enable_thinking") is False:
            return 0
        return _EFFORTS[self.reasoning_effort] if self.reasoning_effort else None


_EFFORTS: dict[str, int | None] = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": None}


class ChatRequest(SamplingFields, ReasoningFields, FormFields, ToolFields):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="allow")  # to see what `others.py` refuses; it is dropped after that

    messages: Annotated[Many[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: Many[str] | None = None
    audio: Any = None
    add_generation_prompt: bool | None = None  # vLLM's two switches: a last message of the assistant is gone on with,
    continue_final_message: bool | None = None  # any other one is answered, whether they say so or not

    @model_validator(mode="after")
    def _can_be_honoured(self) -> ChatRequest:
        refuse(self.__pydantic_extra__, _TEXT_ONLY)
        resumed = self.messages[-1].role == "assistant"
        if resumed and (self.continue_final_message is False or self.add_generation_prompt is True):
            raise ValueError("messages: a last message of the assistant is gone on with; leave it out for a new one")
        if self.add_generation_prompt is False and not resumed:
            raise ValueError("add_generation_prompt: a reply follows always; leave it out")
        for field, instead in (("functions", "tools"), ("function_call", "tool_choice")):
            if getattr(self, field):
                raise ValueError(f"{field}: not served; say {instead}, its successor")
        if self.audio:
            raise ValueError("audio: not served; leave it out")
        if self.modalities not in (None, ["text"]):
            raise ValueError("modalities: this model writes text only")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    model_config = ConfigDict(extra="allow")  # to see what `others.py` refuses; it is dropped after that

    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _can_be_honoured(self) -> CompletionRequest:
        refuse(self.__pydantic_extra__, dict.fromkeys(_CHAT_ONLY, "ask /v1/chat/completions"))
        if self.suffix:
            raise ValueError("suffix: text can't be filled in; leave it out")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: must equal n; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probabilities of a prompt are not served; leave out echo or logprobs")
        if not self.prompt:
            raise ValueError("prompt: is empty")
        return self


_CHAT_ONLY = ChatRequest.model_fields.keys() - CompletionRequest.model_fields.keys()
_TEXT_ONLY = {
    "prompt": "say messages",
    "echo": "ask /v1/completions",
    "suffix": "text can't be filled in",
    "best_of": "say n",
}


class TokenizeRequest(Fields):
    """`POST /tokenize`: a text, or a conversation as the model would read it."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None  # vLLM's name for `content`
    messages: Annotated[Many[ChatMessage], Field(min_length=1, max_length=10_000)] | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Fields):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Many[Annotated[int, Field(ge=0)]]
