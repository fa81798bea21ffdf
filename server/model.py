"""The model that is being served, and everything about it that requests need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..backends.base import Backend, LoadOptions, Vocabulary
from ..backends.engine import Engine
from ..backends.open import Opened, open_backend, open_echo
from ..r1.catalog import BASE_MODEL, R1_ADVICE, Advice
from ..r1.grammar import Grammars
from ..r1.hub import ModelFiles, resolve
from ..r1.prompt import ChatTemplate
from ..r1.thinking import Tags
from ..r1.tool_formats import Format, calls_in
from .replicas import Replicas

ECHO = "echo"
_ADVICE_ELSE = Advice(temperature=0.7, top_p=0.95)  # where nobody says anything: a little below the model's own spread


@dataclass(frozen=True, kw_only=True)
class Named:
    """What is served, under the name that clients call it by."""

    name: str
    source: str  # where it came from, in words
    aliases: frozenset[str] = frozenset()
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time, s

    def answers_to(self, name: str | None) -> bool:
        """Whether a request for this name is for this model; no name is any model."""
        return name is None or name == self.name or name in self.aliases


@dataclass(frozen=True, kw_only=True)
class ServedModel(Named):
    """A model that is loaded in this process."""

    engine: Engine | Replicas
    template: ChatTemplate
    tags: Tags
    grammars: Grammars
    advice: Advice
    reason: str = ""  # why this backend, in words

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens."""
        return self.engine.backend.vocabulary

    @property
    def context_length(self) -> int:
        """Tokens, prompt and reply together."""
        return self.engine.backend.context_length

    @property
    def call_format(self) -> Format:
        """How it writes tool calls."""
        return calls_in(self.template.source).format


def load(name: str, options: LoadOptions, *, alias: str | None = None, chat_template: str | None = None) -> ServedModel:
    """Find, read and start a model: a catalogue name, a hub id, a path, or `echo`. Raises `UserError`."""
    if name == ECHO:
        return serve_opened(ECHO, open_echo(options.parallel, options.context), source="built in", alias=alias)
    files: ModelFiles = resolve(name)
    # An adapter of the user's takes the place of the model's own: it was trained without that one.
    own = None if options.loras or options.backend not in ("auto", "llama.cpp") else files.adapter
    if own:
        options = replace(options, loras=((own, 1.0),))
    opened = open_backend(files.paths, options)
    return serve_opened(
        files.name if own or not files.adapter else BASE_MODEL,
        opened,
        source=files.source,
        alias=alias,
        advice=files.advice,
        chat_template=chat_template,
        thinks=own is not None,
    )


def serve_opened(
    name: str,
    opened: Opened,
    *,
    source: str,
    alias: str | None = None,
    advice: Advice | None = None,
    chat_template: str | None = None,
    start: Callable[[Backend], Engine | Replicas] = Engine,
    thinks: bool = False,
) -> ServedModel:
    """Start the engine of a model that is in memory."""
    vocabulary = opened.backend.vocabulary
    template = ChatTemplate(
        chat_template or opened.chat_template,
        vocabulary.control,
        bos=opened.begin_text,
        eos=opened.end_text,
        thinks=thinks,
    )
    return ServedModel(
        name=alias or name,
        aliases=frozenset({name}),
        engine=start(opened.backend),
        template=template,
        tags=Tags.of(vocabulary.control, vocabulary.end_ids, vocabulary.size, vocabulary.encode),
        grammars=Grammars(vocabulary),
        advice=advice or (R1_ADVICE if template.is_r1 else _ADVICE_ELSE),
        source=source,
        reason=opened.reason,
    )
