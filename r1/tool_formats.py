"""How models write tool calls, and which of these ways a chat template was written for.

A format is a few literal strings; form, prompt and parser (`tools.py`) all follow from them. Which one a template has
is not guessed from its words: it is given a call to write, and what it writes is compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple

from .errors import BadPrompt
from .messages import ToolCall
from .template import Template

_MOST_CALLS = 16  # in one reply


@dataclass(frozen=True, slots=True)
class Format:
    """How calls are written: `opening` call (`between` call)* `closing`, and what a call is made of."""

    name: Literal["prompted", "hermes", "llama3", "deepseek", "deepseek3.1"]
    before_name: str
    before_arguments: str
    after: str
    opening: str = ""
    between: str = "\n"
    closing: str = ""
    trigger: str = ""  # with this a text turns into calls; "" = only at its very start
    most: int = _MOST_CALLS

    def call(self, name: str, arguments: str) -> str:
        """One call as text."""
        return f"{self.before_name}{name}{self.before_arguments}{arguments}{self.after}"

    def calls(self, calls: Sequence[ToolCall]) -> str:
        """All the calls of a reply as text."""
        return self.opening + self.between.join(self.call(c.name, c.arguments) for c in calls) + self.closing


HERMES = Format(
    "hermes",
    before_name='<tool_call>\n{"name": "',
    before_arguments='", "arguments": ',
    after="}\n</tool_call>",
    trigger="<tool_call>",
)
PROMPTED = replace(HERMES, name="prompted")
LLAMA3 = Format("llama3", before_name='{"name": "', before_arguments='", "parameters": ', after="}", most=1)
DEEPSEEK = Format(
    "deepseek",
    opening="<｜tool▁calls▁begin｜>",
    before_name="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    before_arguments="\n```json\n",
    after="\n```<｜tool▁call▁end｜>",
    closing="<｜tool▁calls▁end｜>",
    trigger="<｜tool▁calls▁begin｜>",
)
DEEPSEEK31 = replace(
    DEEPSEEK,
    name="deepseek3.1",
    before_name="<｜tool▁call▁begin｜>",
    before_arguments="<｜tool▁sep｜>",
    after="<｜tool▁call▁end｜>",
    between="",
)
NATIVE = (HERMES, LLAMA3, DEEPSEEK, DEEPSEEK31)


class Calls(NamedTuple):
    """What a template makes of tools: the format that it writes, and how it wants earlier calls."""

    format: Format
    text_arguments: bool = False  # as text, else as an object that it writes down itself
    no_content: str | None = ""  # what a turn's content is that is nothing but calls


@lru_cache(maxsize=8)
def calls_in(template: str | None) -> Calls:
    """The format that a chat template was written for; `prompted` where it knows no tools, or in a way of its own."""
    if not template or not re.search(r"\btools\b", template):
        return Calls(PROMPTED)
    try:
        compiled = Template(template)
    except BadPrompt:
        return Calls(PROMPTED)
    for text_arguments, no_content in product((False, True), ("", None)):
        written = _written(compiled, text_arguments, no_content)
        for form in NATIVE:
            if _squeezed(form.opening + form.call(_NAME, _ARGUMENTS)) in written and _DESCRIPTION in written:
                return Calls(form, text_arguments, no_content)
    return Calls(PROMPTED)


_NAME, _ARGUMENTS, _DESCRIPTION = "probe_tool", '{"probe_key": 1}', "probe-description"


def _written(template: Template, text_arguments: bool, no_content: str | None) -> str:
    """What a template makes of a conversation with a call, without white space; "" where it refuses that."""
    parameters = {"type": "object", "properties": {"probe_key": {"type": "integer"}}, "required": ["probe_key"]}
    tool = {"name": _NAME, "description": _DESCRIPTION, "parameters": parameters}
    arguments: Any = _ARGUMENTS if text_arguments else {"probe_key": 1}
    call = {"id": "probe0000", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    messages = [
        {"role": "user", "content": "probe"},
        {"role": "assistant", "content": no_content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "name": _NAME, "content": "1"},
    ]
    names = {
        "messages": messages,
        "tools": [{"type": "function", "function": tool}],
        "add_generation_prompt": True,
        "enable_thinking": True,
        "bos_token": "",
        "eos_token": "",
    }
    try:
        return _squeezed(template.render(names))
    except BadPrompt:
        return ""


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
