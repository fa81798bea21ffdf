"""A chat template is a program that came with the model: it runs in Jinja's sandbox, and for a bounded time.

The sandbox keeps it from Python's insides; it knows no clock. So each line of the template counts the time that its
thread has worked, and the one after the limit ends it. Knows nothing of conversations.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from .errors import BadPrompt

LIMIT_S = 10.0  # of the thread's own time; 10,000 messages take less than one
_MOST = 1_000_000  # characters or items that a `*` makes at most, bits of a `**`
_HINT = "serve with --chat-template FILE"


class Template:
    """A compiled template. Raises `BadPrompt` where it is broken."""

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # a syntax error, or nested deeper than Python's compiler goes
            raise BadPrompt(f"the model's chat template is broken: {error}", _HINT) from None

    def render(self, names: Mapping[str, Any]) -> str:
        """Render it with these variables. Raises `BadPrompt` with the template's own words."""
        import jinja2

        try:
            with _limited(LIMIT_S):
                return self._template.render(names)
        except jinja2.TemplateError as error:
            raise BadPrompt(f"the model's chat template refuses this conversation: {error}") from None
        except _TooLong:
            raise BadPrompt(f"the model's chat template did not come to an end in {LIMIT_S:g} s", _HINT) from None
        except Exception as error:  # foreign code: it may divide by zero or call itself for ever
            raise BadPrompt(f"the model's chat template cannot render this conversation: {error}") from None


class _TooLong(BaseException):
    """Not an `Exception`: nothing on the way out may swallow it."""


@contextmanager
def _limited(limit_s: float) -> Iterator[None]:
    """Raise `_TooLong` out of a template that is still running then, in this thread."""
    deadline = time.thread_time() + limit_s
    before = sys.gettrace()

    def trace_line(frame: Any, event: str, argument: Any) -> Callable[..., Any]:
        if time.thread_time() > deadline:
            raise _TooLong
        return trace_line

    def trace_call(frame: Any, event: str, argument: Any) -> Callable[..., Any] | None:
        return trace_line if frame.f_code.co_filename == "<template>" else None

    sys.settrace(trace_call)
    try:
        yield
    finally:
        sys.settrace(before)


def _size(operator: str, left: Any, right: Any) -> float:
    """About how large the result of `*` or `**` is: items, or bits."""
    if operator == "**":
        return left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, (int, float)) else 0
    for count, items in ((left, right), (right, left)):
        if isinstance(count, int) and hasattr(items, "__len__"):
            return count * len(items)
    return 0


def _environment() -> Any:
    """Jinja as transformers sets it up, so that templates written for it mean the same here; sandboxed."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model wrote, for training; to us it is only text."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own convention

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))  # `"a" * 10**10` would be one step, and all the memory

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size(operator, left, right) > _MOST:
                raise TemplateError(f"{operator} would make something too large")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
