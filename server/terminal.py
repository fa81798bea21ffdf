"""`stillhouse chat`: the model in the terminal. The answer goes to stdout, thoughts and everything else to stderr.

It is a caller like any other: the same request, the same replies, no HTTP between.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from ..backends.base import LoadOptions
from ..r1.errors import UserError
from . import settings as flags
from .chat import chat_ask
from .errors import as_api_error
from .metrics import Metrics
from .model import ServedModel, load
from .reply import Replies
from .schema import ChatRequest

_HELP = """  /new      start over        /thoughts  show or hide them      /quit  leave (also Ctrl-D)
  Enter while it thinks: answer now        Ctrl-C while it replies: stop it"""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def chat(arguments: argparse.Namespace, options: LoadOptions, chat_template: str | None) -> int:
    """One question, or a conversation; the exit code. Raises `UserError`."""
    question = " ".join(arguments.question)
    if not sys.stdin.isatty() and (piped := sys.stdin.read().strip()):
        question = f"{question}\n\n{piped}" if question else piped
    if not question and not sys.stdin.isatty():
        raise UserError("there is no question", 'stillhouse chat "What is 17 * 23?"')
    name = flags.model(arguments)
    print(f"loading {name} …", file=sys.stderr, flush=True)
    model = load(name, options, alias=arguments.alias, chat_template=chat_template)
    try:
        talk = _Talk(model, arguments)
        if question:
            return 0 if talk.turn(question) else 130
        print(f"{model.name} is ready.\n{_HELP}", file=sys.stderr)
        return talk.converse()
    finally:
        model.engine.close()


class _Talk:
    """A conversation and how it is shown."""

    def __init__(self, model: ServedModel, arguments: argparse.Namespace) -> None:
        self._model = model
        self._arguments = arguments
        self._show_thoughts = not arguments.hide_thoughts
        self._messages: list[dict[str, str]] = []
        self._start()

    def converse(self) -> int:
        """Read lines until the user leaves; the exit code."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history and line editing
        while True:
            try:
                line = input("\n› ").strip()
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return 0
            match line:
                case "":
                    continue
                case "/quit" | "/exit":
                    return 0
                case "/new":
                    self._start()
                    print("a new conversation", file=sys.stderr)
                case "/thoughts":
                    self._show_thoughts = not self._show_thoughts
                    print(f"thoughts are {'shown' if self._show_thoughts else 'hidden'}", file=sys.stderr)
                case _ if line.startswith("/"):
                    print(_HELP, file=sys.stderr)
                case _:
                    try:
                        self.turn(line)
                    except UserError as error:
                        print(f"error: {error}", file=sys.stderr)

    def turn(self, question: str) -> bool:
        """Ask, show the reply as it comes, and remember both; false where Ctrl-C stopped it."""
        self._messages.append({"role": "user", "content": question})
        fields: dict[str, Any] = {
            "messages": self._messages,
            "max_tokens": self._arguments.max_tokens,
            "temperature": self._arguments.temperature,
            "seed": self._arguments.seed,
        }
        try:
            ask = chat_ask(self._model, ChatRequest.model_validate(fields))
        except (ValidationError, UserError) as error:
            self._messages.pop()
            raise UserError(as_api_error(error).message) from None
        replies = Replies(self._model, ask, Metrics())
        answer: list[str] = []
        try:
            asyncio.run(self._show(replies, answer))
        except KeyboardInterrupt:
            print(f"{_PLAIN if sys.stderr.isatty() else ''}\nstopped", file=sys.stderr)
            self._messages.pop()
            return False
        self._messages.append({"role": "assistant", "content": "".join(answer)})
        return True

    async def _show(self, replies: Replies, answer: list[str]) -> None:
        thinking = False
        colour = sys.stderr.isatty()
        with _enter_key(replies):
            async for piece in replies.pieces():
                for delta in piece.deltas:
                    if delta.channel == "reasoning":
                        if self._show_thoughts:
                            _write(sys.stderr, (_DIM if colour and not thinking else "") + delta.text)
                        elif not thinking:
                            _write(sys.stderr, f"{_DIM}thinking …{_PLAIN}" if colour else "thinking …")
                        thinking = True
                        continue
                    if thinking:
                        thinking = False
                        _write(sys.stderr, (_PLAIN if colour else "") + ("\n\n" if self._show_thoughts else "\n"))
                    answer.append(delta.text)
                    _write(sys.stdout, delta.text)
                if piece.finish == "length":
                    _write(sys.stderr, f"{_PLAIN if colour else ''}\n(cut: the reply reached its limit)")
        if thinking and colour:
            _write(sys.stderr, _PLAIN)
        _write(sys.stdout, "\n")

    def _start(self) -> None:
        system = self._arguments.system
        self._messages = [{"role": "system", "content": system}] if system else []


@contextlib.contextmanager
def _enter_key(replies: Replies) -> Iterator[None]:
    """While a reply comes, Enter ends its thoughts; only where there is a keyboard."""
    if not sys.stdin.isatty():
        yield
        return
    loop = asyncio.get_running_loop()

    def pressed() -> None:
        sys.stdin.readline()
        replies.end_thinking()

    try:
        loop.add_reader(sys.stdin, pressed)
    except NotImplementedError:  # Windows' event loop watches no console
        yield
        return
    try:
        yield
    finally:
        loop.remove_reader(sys.stdin)


def _write(stream: Any, text: str) -> None:
    stream.write(text)
    stream.flush()
