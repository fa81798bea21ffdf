"""What form an answer is to have, and what it may call: `response_format`, `regex`, … and `tools`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from ..r1.grammar import ANY_OBJECT, Kind
from ..r1.tools import Tool, ToolUse
from .fields import Fields, Many, Name

AnySchema = dict[str, Any] | bool


class JsonSchema(Fields):
    """`response_format.json_schema`. A schema is kept to the letter whether `strict` or not."""

    name: str | None = None
    description: str | None = None
    json_schema: Annotated[AnySchema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Fields):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a response_format of type json_schema needs a field json_schema with a schema in it")
        return self


Choice = Annotated[Many[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=4096)]


class StructuredOutputs(Fields):
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


class FormFields(Fields):
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


class FunctionTool(Fields):
    """`tools[].function`. Arguments are kept to its schema whether `strict` or not."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(Fields):
    """`tools[]`."""

    type: str
    function: FunctionTool | None = None

    @model_validator(mode="after")
    def _a_function(self) -> ToolField:
        if self.type != "function" or self.function is None:
            raise ValueError("a tool is of type 'function' and has a field 'function'; there is no other kind here")
        return self


class ToolFields(Fields):
    """What a request says of tools."""

    tools: Annotated[Many[ToolField], Field(max_length=128)] | None = None
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
