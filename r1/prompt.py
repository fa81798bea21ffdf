"""A conversation in, a prompt out: the model's own chat template, and what R1 wants around it.

What a user writes stays text. Templates paste it into a string in which `<｜Assistant｜>` means a turn, so before
rendering every control token that occurs in a message is cut in two by a mark, and the rendered string comes apart
again at the marks: each segment is encoded by itself, and no segment holds a control token but those of the template.
(`llama_tokenize` with `parse_special=false` would not do: it still matches user-defined tokens such as `</think>`.)

Knows nothing of any runtime, and decides by the template and the vocabulary alone, never by a model's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from .errors import BadPrompt
from .messages import Message, ToolCall
from .template import Template
from .tool_formats import calls_in

OPEN, CLOSE = "<think>", "</think>"
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them free for internal use
_R1_TURNS = ("<｜User｜>", "<｜Assistant｜>")

R1_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '<｜Assistant｜>' + message.content + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
"""DeepSeek's format (model card of DeepSeek-R1, February 2025), for files that carry no template."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered conversation."""

    segments: tuple[str, ...]  # joined they are the text; encoded one by one they are safe
    thinking: Literal["open", "closed", "unsaid"]  # does it end inside `<think>`, after `</think>`, or say nothing?

    @property
    def text(self) -> str:
        """The prompt as the model reads it."""
        return "".join(self.segments)

    def encode(self, encode: Callable[[str], list[int]], bos_id: int | None) -> list[int]:
        """Token ids, with exactly one begin-of-sequence token where the model wants one."""
        ids = [token_id for segment in self.segments for token_id in encode(segment)]
        if bos_id is not None and ids[:1] != [bos_id]:
            ids.insert(0, bos_id)
        while bos_id is not None and ids[1:2] == [bos_id]:
            del ids[1]
        return ids


class ChatTemplate:
    """One model's way to write a conversation down."""

    def __init__(
        self, source: str | None, control: Collection[str], *, bos: str = "", eos: str = "", thinks: bool = False
    ) -> None:
        self.is_r1 = all(turn in control for turn in (*_R1_TURNS, OPEN, CLOSE))
        self.can_think = thinks or (OPEN in control and CLOSE in control)  # some spell the tags with other tokens
        if source is None and self.is_r1:
            source = R1_TEMPLATE
        self.source = source
        self._bos, self._eos = bos, eos
        # White space and single characters are user-defined tokens of some models; they change no turn.
        names = sorted((name for name in {*control, OPEN, CLOSE} if len(name) > 1 and name.strip()), reverse=True)
        self._control = re.compile("(?=(" + "|".join(map(re.escape, names)) + "))")

    @cached_property
    def _template(self) -> Template:
        if self.source is None:
            raise BadPrompt(
                "this model file carries no chat template",
                "use /v1/completions with a prompt of your own, or serve with --chat-template FILE",
            )
        return Template(self.source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool = True,
        preserve_thinking: bool = False,
        reply_follows: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Prompt:
        """Render a conversation up to where the model's reply begins, or without `reply_follows`, its end.

        A last message of the assistant is one to go on with, in its thoughts or in its answer. Thoughts in earlier
        turns are left out unless `preserve_thinking`. `tools` are for a template that knows them. Raises `BadPrompt`
        with the template's own words.
        """
        variables = variables or {}
        mark, opened, closed = self._free_marks(messages, variables, tools)
        variables = {key: self._defuse(it, mark) if isinstance(it, str) else it for key, it in variables.items()}
        if tools:
            variables["tools"] = self._defuse_all(list(tools), mark)
        resumed = messages[-1] if reply_follows and messages and messages[-1].role == "assistant" else None
        history = messages[:-1] if resumed else messages
        turns = [self._turn(message, preserve_thinking, mark, opened, closed) for message in history]
        text = self._render(turns, thinking, reply_follows, variables)
        if reply_follows:
            text = self._begin_reply(text, thinking, resumed, mark)
        text = text.replace(opened, OPEN).replace(closed, CLOSE)
        return Prompt(tuple(filter(None, text.split(mark))), _thinking_state(text) if reply_follows else "closed")

    def _render(
        self, turns: list[dict[str, Any]], thinking: bool, reply_follows: bool, variables: Mapping[str, Any]
    ) -> str:
        names = {
            **variables,  # first: none of them may stand in for what follows
            "messages": turns,
            "add_generation_prompt": reply_follows,
            "enable_thinking": thinking,
            "bos_token": self._bos,
            "eos_token": self._eos,
        }
        return self._template.render(names)

    def _begin_reply(self, text: str, thinking: bool, resumed: Message | None, mark: str) -> str:
        """Open or close the thoughts at the end of a prompt, and put what there already is of the reply after it."""
        state = _thinking_state(text)
        if resumed is None:
            if not thinking and self.can_think and state != "closed":
                return _before_thoughts(text) + f"{OPEN}\n\n{CLOSE}\n\n"  # R1's own way to write "no thoughts"
            if thinking and self.is_r1 and state == "unsaid":
                return text + f"{OPEN}\n"  # DeepSeek's advice: else it may skip thinking
            return text
        answer = self._defuse(answer_of(resumed), mark)
        reasoning = self._defuse(_reasoning_of(resumed), mark)
        if not (reasoning or self.can_think):
            return text + answer
        if answer or (resumed.content and not reasoning):
            return _before_thoughts(text) + f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{answer}"
        return _before_thoughts(text) + f"{OPEN}\n{reasoning}"

    def _turn(self, message: Message, preserve: bool, mark: str, opened: str, closed: str) -> dict[str, Any]:
        content = message.content
        if message.role == "assistant":
            answer = self._defuse(answer_of(message), mark)
            reasoning = self._defuse(_reasoning_of(message), mark)
            content = f"{opened}\n{reasoning}\n{closed}\n\n{answer}" if preserve and reasoning else answer
        else:
            content = self._defuse(content, mark)
        turn: dict[str, Any] = {"role": self._defuse(message.role, mark), "content": content}
        if message.name:
            turn["name"] = self._defuse(message.name, mark)
        if message.call_id:
            turn["tool_call_id"] = self._defuse(message.call_id, mark)
        if message.calls:
            turn["tool_calls"] = [self._call(call, mark) for call in message.calls]
            turn["content"] = content or calls_in(self.source).no_content
        return turn

    def _call(self, call: ToolCall, mark: str) -> dict[str, Any]:
        """A call as the template wants it: the arguments as an object to be written down, or as text."""
        arguments: Any = call.arguments if calls_in(self.source).text_arguments else json.loads(call.arguments)
        function = {"name": call.name, "arguments": arguments}
        return self._defuse_all({"id": call.id, "type": "function", "function": function}, mark)

    def _defuse_all(self, value: Any, mark: str) -> Any:
        """Every string in a JSON value, the keys too, without control tokens."""
        if isinstance(value, str):
            return self._defuse(value, mark)
        if isinstance(value, Mapping):
            return {self._defuse(str(key), mark): self._defuse_all(it, mark) for key, it in value.items()}
        return [self._defuse_all(it, mark) for it in value] if isinstance(value, (list, tuple)) else value

    def _defuse(self, text: str, mark: str) -> str:
        """Cut every control token in a text in two, behind its first character; overlapping ones too."""
        starts = [found.start() + 1 for found in self._control.finditer(text)]
        return mark.join(text[a:b] for a, b in zip([0, *starts], [*starts, None], strict=True))

    def _free_marks(self, messages: Sequence[Message], variables: Mapping[str, Any], tools: Sequence[Any]) -> list[str]:
        """Three characters that the caller uses nowhere: a cut, and stand-ins for the two tags."""
        everything = "".join(f"{m.role}{m.content}{m.reasoning or ''}{m.name or ''}" for m in messages)
        everything += "".join(value for value in variables.values() if isinstance(value, str))
        everything += "".join(f"{call.name}{call.arguments}{call.id}" for m in messages for call in m.calls)
        everything += "".join(m.call_id or "" for m in messages) + json.dumps(list(tools), ensure_ascii=False)
        free = [character for character in _NONCHARACTERS if character not in everything][:3]
        if len(free) < 3:
            raise BadPrompt(
                "the messages use nearly all of Unicode's noncharacters (U+FDD0 to U+FDEF)", "leave some out"
            )
        return free


def answer_of(message: Message) -> str:
    """An assistant's turn without its thoughts, however they came: tagged, without the opener, or never closed.

    >>> texts = "<think>hm</think>\\n\\nfour", "hm</think>four", "<think>hm"
    >>> [answer_of(Message("assistant", text)) for text in texts]
    ['four', 'four', '']
    """
    content = message.content
    opened = content.lstrip().startswith(OPEN)
    before, closed, after = content.partition(CLOSE)
    # Where the thoughts came apart, a closing tag without an opener is a word of the answer.
    if closed and (opened or (OPEN not in before and message.reasoning is None)):
        return after.lstrip("\n")
    return "" if opened else content


def _reasoning_of(message: Message) -> str:
    if message.reasoning is not None:
        return message.reasoning.strip("\n")
    before, closed, _ = message.content.partition(CLOSE)
    opened = before.lstrip().startswith(OPEN)
    return before.lstrip().removeprefix(OPEN).strip("\n") if opened or (closed and OPEN not in before) else ""


def _thinking_state(text: str) -> Literal["open", "closed", "unsaid"]:
    """What the end of a prompt says about thoughts; tags in earlier turns say nothing."""
    tail = text.rstrip()
    if tail.endswith(CLOSE):
        return "closed"
    if tail.endswith(OPEN):
        return "open"
    opened, closed = text.rfind(OPEN), text.rfind(CLOSE)
    turn = max(text.rfind(name) for name in (*_R1_TURNS, "<|im_start|>", "<|start_header_id|>"))
    if max(opened, closed) > turn >= 0:
        return "open" if opened > closed else "closed"
    return "unsaid"


def _before_thoughts(text: str) -> str:
    """A prompt without the thoughts that its template opened (or opened and closed) at its end."""
    tail = text.rstrip()
    if tail.endswith(CLOSE):
        tail = tail.removesuffix(CLOSE).rstrip()
    return tail.removesuffix(OPEN) if tail.endswith(OPEN) else text
