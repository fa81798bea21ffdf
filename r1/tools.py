"""Tool calls in and out: what a model is told of its tools, the form its calls have, and how they are read again.

Models that were trained for tools say so in their chat template, and are asked in the format they know. The others, the
R1 distills among them, are told in the prompt and held to the same kind of form, so that every call can be read.
A format is a few literal strings; form, prompt and parser all follow from them. Knows nothing of JSON requests, and
nothing of thoughts: only answers come here, so a call in the thoughts stays what it is, a thought.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .errors import BadForm, UserError
from .grammar import Form, Grammars
from .json_schema import inner_schema, shortest_text
from .messages import CallDelta, Message, ToolCall
from .split import overlap
from .tool_formats import Format

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str  # letters, digits, - and _
    description: str | None = None
    parameters: Mapping[str, Any] | None = None  # JSON schema of its arguments; None = it takes none

    @property
    def json(self) -> dict[str, Any]:
        """As OpenAI's clients send it, and as chat templates expect it."""
        description = self.description or ""  # Hermes' template adds it to a text, and fails where there is none
        parameters = dict(self.parameters or _NO_PARAMETERS)
        return {
            "type": "function",
            "function": {"name": self.name, "description": description, "parameters": parameters},
        }


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and what it wants done with them."""

    tools: tuple[Tool, ...]
    must_call: bool = False  # else text will do
    parallel: bool = True


class BadTool(UserError):
    """A tool whose arguments can't be held to its schema; `index` is its place, `part` where in the schema."""

    def __init__(self, message: str, index: int, part: str) -> None:
        super().__init__(message)
        self.index = index
        self.part = part


# Into the prompt


def told_in_prompt(messages: Sequence[Message], use: ToolUse | None, form: Format) -> list[Message]:
    """The conversation for a model that knows nothing of tools: calls and results as text, tools in the first turn."""
    turns: list[Message] = []
    for message in messages:
        if message.role in ("tool", "function"):
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if turns and turns[-1].role == "user" and turns[-1].content.endswith("</tool_response>"):
                turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{result}")
            else:
                turns.append(Message("user", result))
        elif message.calls:
            text = "\n".join(filter(None, (message.content, form.calls(message.calls))))
            turns.append(replace(message, content=text, calls=()))
        else:
            turns.append(message)
    if use is None:
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return [Message("user", _instruction(use, form)), *turns]
    turns[first] = replace(turns[first], content=f"{_instruction(use, form)}\n\n{turns[first].content}")
    return turns


def _instruction(use: ToolUse, form: Format) -> str:
    functions = "\n".join(json.dumps(tool.json["function"], ensure_ascii=False) for tool in use.tools)
    only = f"`{use.tools[0].name}`" if len(use.tools) == 1 else "one of them"
    many = ", once for each call" if use.parallel else ", once"
    demand = f"You must call {only} now." if use.must_call else "If none of them helps, answer in plain text instead."
    return (
        f"You can call these functions; each line is one, with the JSON schema of its parameters:\n{functions}\n\n"
        f"To call {only}, think first, and then answer with exactly this and nothing else{many}:\n"
        f"{form.call('the name', '{its arguments as JSON}')}\n"
        f"What it returns is given to you between <tool_response> and </tool_response>. {demand}"
    )


# The form of an answer


def form_of_calls(
    use: ToolUse, form: Format, grammars: Grammars, control: Mapping[str, int], answer_schema: str | None = None
) -> Form:
    """The form of an answer that may or must call tools; with a schema for the answer where it does not.

    Raises `BadTool`, and `BadForm` where all of them together are too much.
    """
    schemas = [_arguments_schema(tool, index, grammars) for index, tool in enumerate(use.tools)]
    most = form.most if use.parallel else 1

    def text(literal: str) -> str:
        return _literal(literal, control)

    again = f"({text(form.between)} call){{0,{most - 1}}}" if most > 1 else ""
    rules = [
        f"bodies: {' | '.join(f'body_{i}' for i in range(len(schemas)))}",
        f"call: {text(form.before_name)} bodies",
        f"more: {again} {text(form.closing)}",
        f"calls: {text(form.opening)} call more",
        "TEXT: /(.|\\n)*/",
    ]
    for i, (tool, schema) in enumerate(zip(use.tools, schemas, strict=True)):
        rules.append(f"body_{i}: {text(tool.name + form.before_arguments)} %json {schema} {text(form.after)}")
    if use.must_call:
        rules.append("start: calls")
    elif answer_schema is not None:
        rules.append(f"start: %json {inner_schema(answer_schema)} | calls")
    elif not form.trigger:
        rules += ["start: PROSE | calls", "PROSE: /([^{](.|\\n)*)?/"]
    else:  # from the trigger on it is a call, be it one token or several
        begun = (form.opening + form.before_name).removeprefix(form.trigger)
        token = f" | TEXT <[{control[form.trigger]}]>" if form.trigger in control else ""
        rules += [
            f"start: TEXT | lead {text(begun)} bodies more",
            f"lead: lead_text{token}",
            f"lead_text[lazy]: TEXT {json.dumps(form.trigger, ensure_ascii=False)}",
        ]
    # Where text will do, the thoughts need not make room for a call.
    asked = zip(use.tools, schemas, strict=True) if use.must_call else ()
    shortest = [form.call(tool.name, shortest_text(schema)) for tool, schema in asked]
    source, marks = "\n".join(rules), _control_in(form, control)
    return grammars.compile("lark", source, marks=marks, shortest=max(shortest, key=len, default=""))


def _arguments_schema(tool: Tool, index: int, grammars: Grammars) -> str:
    """A tool's schema as part of a grammar; compiled by itself first, so that a complaint names the tool."""
    schema = dict(tool.parameters or _NO_PARAMETERS)
    if schema.setdefault("type", "object") != "object":
        raise BadTool("a function's parameters are an object", index, "type")
    try:
        text = inner_schema(json.dumps(schema, ensure_ascii=False))
        grammars.compile("json_schema", text)
    except BadForm as error:
        raise BadTool(error.message, index, error.part) from None
    return text


def _literal(text: str, control: Mapping[str, int]) -> str:
    """A text in Lark's notation; where it has a control token, that token or its text."""
    names = sorted((name for name in control if name in text and len(name) > 1 and name.strip()), key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    written = (
        f"(<[{control[part]}]> | {json.dumps(part, ensure_ascii=False)})"
        if part in names
        else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )
    return " ".join(written) or '""'


def _control_in(form: Format, control: Mapping[str, int]) -> frozenset[int]:
    text = form.calls([ToolCall("", "", "")])
    return frozenset(i for name, i in control.items() if len(name) > 1 and name.strip() and name in text)


# Out of an answer


class CallParser:
    """Reads an answer that is held to a format: text in; text and pieces of calls out, however it is cut."""

    def __init__(self, form: Format) -> None:
        self._head = re.compile(f"{re.escape(form.before_name)}([a-zA-Z0-9_-]+){re.escape(form.before_arguments)}")
        self._trigger = form.trigger or form.before_name
        self._at_start_only = not form.trigger
        self._state: Literal["text", "between", "arguments"] = "text"
        self._held = ""
        self._some_text = False
        self._depth, self._in_string, self._escaped = 0, False, False
        self.begun = 0  # calls
        self.whole = 0  # calls whose arguments are complete

    def add(self, text: str) -> tuple[str, list[CallDelta]]:
        """Take the next piece of the answer; give the text and the pieces of calls that have become clear."""
        said, calls = "", []
        while text:
            match self._state:
                case "text":
                    piece, text = self._text(text)
                    said += piece
                case "between":
                    self._held += text
                    text = ""
                    if found := self._head.search(self._held):
                        text, self._held = self._held[found.end() :], ""
                        calls.append(CallDelta(self.begun, "", new_call_id(), found[1]))
                        self.begun += 1
                        self._state = "arguments"
                case "arguments":
                    end = self._end_of_arguments(text)
                    calls.append(CallDelta(self.begun - 1, text[:end]))
                    text = text[end:]
                    if self._state == "arguments" and not self._depth:
                        self._state = "between"
                        self.whole += 1
        return said, calls

    def finish(self) -> str:
        """Give what was held back: no call followed."""
        held, self._held = (self._held, "") if self._state == "text" else ("", "")
        return held

    def _text(self, text: str) -> tuple[str, str]:
        """The text before a trigger, and what is left to look at; white space before calls is no text."""
        text, self._held = self._held + text, ""
        at = text.find(self._trigger) if not (self._at_start_only and self._some_text) else -1
        if at >= 0 and not (self._at_start_only and text[:at].strip()):
            self._state = "between"
            return text[:at].rstrip(), text[at:]
        clear = len(text) - overlap(text, self._trigger)
        clear = len(text[:clear].rstrip())
        self._held = text[clear:]
        self._some_text = self._some_text or bool(clear)
        return text[:clear], ""

    def _end_of_arguments(self, text: str) -> int:
        """How much of a text belongs to the JSON object that is being read."""
        for i, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if not self._depth:
                    return i + 1
        return len(text)


def new_call_id() -> str:
    """A name for a call, by which its result will be known."""
    return f"call_{secrets.token_hex(12)}"
