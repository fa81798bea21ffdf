"""What a request may say: OpenAI's fields, ours, and their limits. Unknown fields are accepted and ignored.

Fields that we know and cannot honour are refused by name: a client that asks for audio must not get prose.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..r1.grammar import ANY_OBJECT, Kind
from ..r1.messages import Message, ToolCall
from ..r1.tools import Tool, ToolUse

_MOST_STOPS, _LONGEST_STOP = 16, 1000
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class TextPart(_Fields):
    """A part of a message's content; text is the only kind there is."""

    type: str
    text: str | None = None


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class CalledFunction(_Fields):
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


class MadeCall(_Fields):
    """`tool_calls[]` of an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Fields):
    """One message as clients send it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MadeCall] | None = None
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


class StreamOptions(_Fields):
    """`stream_options`."""

    include_usage: bool | None = None


AnySchema = dict[str, Any] | bool


class JsonSchema(_Fields):
    """`response_format.json_schema`. A schema is kept to the letter whether `strict` or not."""

    name: str | None = None
    description: str | None = None
    json_schema: Annotated[AnySchema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Fields):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a response_format of type json_schema needs a field json_schema with a schema in it")
        return self


Choice = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=4096)]


class StructuredOutputs(_Fields):
    """`structured_outputs`, vLLM's way to say what ours say at the top."""

    model_config = ConfigDict(extra="forbid")  # another of vLLM's constraints would change the answer

    json_schema: Annotated[AnySchema | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None


class AskedForm(NamedTuple):
    """The form that an answer is to have, and the field that says so."""

    kind: Kind
    text: str
    param: str


class FormFields(_Fields):
    """What form the answer is to have: one of these at most."""

    response_format: ResponseFormat | None = None
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None  # Lark's notation or llama.cpp's GBNF
    structured_outputs: StructuredOutputs | None = None
    guided_json: AnySchema | str | None = None  # vLLM's older names
    guided_regex: str | None = None
    guided_choice: Choice | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> FormFields:
        first, *more = [form.param.partition(".")[0] for form in self._forms()] or [""]
        if more:
            raise ValueError(f"{more[0]}: an answer has one form, and {first} says another; leave one out")
        return self

    @property
    def form(self) -> AskedForm | None:
        """The form, if any is asked for."""
        return next(iter(self._forms()), None)

    def _forms(self) -> list[AskedForm]:
        forms: list[AskedForm] = []
        if self.response_format and self.response_format.type == "json_object":
            forms.append(AskedForm("json_schema", ANY_OBJECT, "response_format"))
        if self.response_format and self.response_format.type == "json_schema" and self.response_format.json_schema:
            schema = json.dumps(self.response_format.json_schema.json_schema)
            forms.append(AskedForm("json_schema", schema, "response_format.json_schema.schema"))
        if more := self.structured_outputs:
            forms += _plain_forms("structured_outputs.", more.json_schema, more.regex, more.choice, more.grammar)
            forms += [AskedForm("json_schema", ANY_OBJECT, "structured_outputs.json_object")] * bool(more.json_object)
        forms += _plain_forms("", None, self.regex, self.choice, self.grammar)
        forms += _plain_forms("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        return forms


def _plain_forms(
    prefix: str,
    schema: AnySchema | str | None,
    regex: str | None,
    choice: list[str] | None,
    lark: str | None,
) -> list[AskedForm]:
    forms: list[AskedForm] = []
    if schema is not None:
        forms.append(
            AskedForm("json_schema", schema if isinstance(schema, str) else json.dumps(schema), f"{prefix}json")
        )
    if regex is not None:
        forms.append(AskedForm("regex", regex, f"{prefix}regex"))
    if choice is not None:
        forms.append(AskedForm("choice", json.dumps(choice), f"{prefix}choice"))
    if lark is not None:
        forms.append(AskedForm("grammar", lark, f"{prefix}grammar"))
    return forms


class SamplingFields(_Fields):
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
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
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
        if bias and len(bias) > 1024:
            raise ValueError(f"at most 1024 tokens; these are {len(bias)}")
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


class ReasoningFields(_Fields):
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
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

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


class FunctionTool(_Fields):
    """`tools[].function`. Arguments are kept to its schema whether `strict` or not."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(_Fields):
    """`tools[]`."""

    type: str
    function: FunctionTool | None = None

    @model_validator(mode="after")
    def _a_function(self) -> ToolField:
        if self.type != "function" or self.function is None:
            raise ValueError("a tool is of type 'function' and has a field 'function'; there is no other kind here")
        return self


class ToolFields(_Fields):
    """What a request says of tools."""

    tools: Annotated[list[ToolField], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _choice_can_be_made(self) -> ToolFields:
        names = self._names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tools: {twice!r} is there twice; every function has a name of its own")
        choice = self._choice
        if choice is None:
            raise ValueError(
                "tool_choice: say 'auto', 'none', 'required', or "
                '{"type": "function", "function": {"name": …}} for one of the tools'
            )
        if choice not in ("auto", "none") and not names:
            raise ValueError("tool_choice: there are no tools to choose from; send tools, or leave it out")
        if isinstance(self.tool_choice, dict) and choice not in names:
            raise ValueError(f"tool_choice: there is no tool {choice[:64]!r}; there is {', '.join(names)[:200]}")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        """The tools that may be called now, if any."""
        named, choice = isinstance(self.tool_choice, dict), self._choice
        functions = [tool.function for tool in self.tools or () if tool.function]
        chosen = [f for f in functions if not named or f.name == choice]
        if not chosen or (choice == "none" and not named):
            return None
        tools = tuple(Tool(f.name, f.description, f.parameters) for f in chosen)
        return ToolUse(tools, named or choice == "required", self.parallel_tool_calls is not False)

    def place_of(self, tool: Tool) -> int:
        """Where in `tools` it stands."""
        return self._names.index(tool.name)

    @property
    def _names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or () if tool.function]

    @property
    def _choice(self) -> str | None:
        """`auto`, `none`, `required`, or the name of a tool; `None` where it can't be understood."""
        match self.tool_choice:
            case None:
                return "auto"
            case "auto" | "none" | "required":
                return self.tool_choice
            case {"type": "function", "function": {"name": str(name)}}:
                return name
            case _:
                return None


class ChatRequest(SamplingFields, ReasoningFields, FormFields, ToolFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None

    @model_validator(mode="after")
    def _can_be_honoured(self) -> ChatRequest:
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

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    response_format: Any = None
    structured_outputs: Any = None
    regex: Any = None
    choice: Any = None
    grammar: Any = None
    tools: Any = None

    @model_validator(mode="after")
    def _can_be_honoured(self) -> CompletionRequest:
        for field in ("response_format", "structured_outputs", "regex", "choice", "grammar", "tools"):
            if getattr(self, field):
                raise ValueError(f"{field}: not served here; ask /v1/chat/completions")
        if self.suffix:
            raise ValueError("suffix: text can't be filled in; leave it out")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: must equal n; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probabilities of a prompt are not served; leave out echo or logprobs")
        if not self.prompt:
            raise ValueError("prompt: is empty")
        return self


class TokenizeRequest(_Fields):
    """`POST /tokenize`: a text, or a conversation as the model would read it."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None  # vLLM's name for `content`
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(_Fields):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
