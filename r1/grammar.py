"""Answers of a given form: a JSON schema, a regular expression, a list of choices or a grammar -> token masks.

llguidance does the parsing and knows the tokens as bytes; this file gives it the vocabulary, bounds what a stranger's
form may cost, and remembers what was compiled; `json_schema.py` prepares schemas for it. It knows nothing of thoughts
(`thinking.py` asks for a mask where an answer is due), of JSON requests, or of any runtime.

No control token is ever part of a form's text: the vocabulary tells llguidance which ones they are, and they are cut
out of every mask once more, because a grammar may name one.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BadForm
from .json_schema import complaint, part_of, read_schema, schema_grammar, shortest_text

Kind = Literal["json_schema", "regex", "choice", "grammar", "lark"]  # a grammar is Lark's notation or GBNF
Bits = NDArray[np.uint32]

ANY_OBJECT = '{"type": "object"}'
_LONGEST = 131_072  # characters of a form
_REMEMBERED = 64  # compiled forms


class Vocabulary(Protocol):
    """What a grammar needs to know of a model's tokens."""

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def end_ids(self) -> frozenset[int]: ...  # noqa: D102

    @property
    def control(self) -> dict[str, int]: ...  # noqa: D102

    def encode(self, text: str) -> list[int]: ...  # noqa: D102

    def piece(self, token_id: int) -> bytes: ...  # noqa: D102


class Grammars:
    """The forms of one vocabulary. Any thread may compile; one does at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens = _Tokens(vocabulary)
        self._vocabulary = vocabulary
        self._compiled: OrderedDict[tuple[str, str, frozenset[int]], Form] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, kind: Kind, text: str, *, marks: frozenset[int] = frozenset(), shortest: str = "") -> Form:
        """Make a form from its text; a `choice` and a schema are JSON. Slow the first time, so not for an event loop.

        `marks` are control tokens that it may use; `shortest` is about its shortest text where only the caller knows.
        Raises `BadForm`.
        """
        if len(text) > _LONGEST:
            raise BadForm(f"it has {len(text)} characters; at most {_LONGEST} are compiled")
        key = (kind, text, marks)
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(kind, text, marks, shortest)
                if len(self._compiled) > _REMEMBERED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key]

    def _compile(self, kind: Kind, text: str, marks: frozenset[int], shortest: str) -> Form:
        import llguidance

        schema = read_schema(text) if kind == "json_schema" else None
        try:
            if kind == "json_schema":
                source = schema_grammar(schema)
            elif kind == "regex":
                source = llguidance.LLMatcher.grammar_from_regex(text)
            elif kind == "choice":
                choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
                source = llguidance.grammar_from("lark", "start: " + " | ".join(choices))
            else:
                source = llguidance.grammar_from("grammar" if kind == "grammar" else "lark", text)
            matcher = llguidance.LLMatcher(self._tokens.llguidance, source, log_level=0, limits=_limits())
        except ValueError as error:
            raise BadForm(complaint(str(error))) from None
        if matcher.is_error():
            words = matcher.get_error()
            raise BadForm(complaint(words), part_of(schema, words) if kind == "json_schema" else "")
        allowed = self._tokens.bits(but=self._tokens.special - marks - self._vocabulary.end_ids)
        names = {token_id: self._vocabulary.piece(token_id).decode(errors="replace") for token_id in marks}
        form = Form(matcher, self._tokens, allowed, names, self._least_tokens(kind, text, shortest))
        first = form.start()
        first.mask()
        if first.is_broken:
            raise BadForm("it allows no text at all; control tokens can't be part of it")
        return form

    def _least_tokens(self, kind: Kind, text: str, shortest: str) -> int:
        """About how many tokens the shortest text of a form takes, with some slack: the model writes as it likes."""
        match kind:
            case "json_schema":
                shortest = shortest_text(text)
            case "choice":
                shortest = max(json.loads(text), key=len, default="")
            case _:
                pass
        return len(self._vocabulary.encode(shortest)) * 5 // 4 + 16


@dataclass(frozen=True, slots=True)
class Form:
    """A compiled form; any number of replies may follow it."""

    pristine: Any  # llguidance's matcher, never moved
    tokens: _Tokens
    allowed: Bits  # all tokens but the control tokens that have no place in it
    marks: dict[int, str]  # control tokens that have a place in it, and their text, which a reader is not shown
    least_tokens: int  # that a reply needs

    def start(self) -> Matcher:
        """What one reply is held to."""
        with self.tokens.copying:
            return Matcher(self, self.pristine.deep_copy())

    def accepts(self, text: str) -> bool:
        """Whether a text is whole by this form."""
        matcher = self.start()
        return matcher.take_text(text) and matcher.may_end


class Matcher:
    """One reply as far as it has come. Not thread-safe."""

    __slots__ = ("_matcher", "form", "is_broken")

    def __init__(self, form: Form, matcher: Any) -> None:
        self.form = form
        self.is_broken = False  # a limit was hit, or a token came that no mask had: it can't be followed any more
        self._matcher = matcher

    def mask(self) -> Bits:
        """The tokens that may come next, as bits; end tokens are among them where the text may end."""
        bits = np.zeros_like(self.form.allowed)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        bits &= self.form.allowed
        self.is_broken = self.is_broken or self._matcher.is_error() or not bits.any()
        return bits

    def take(self, token_id: int) -> None:
        """Follow the reply by one token."""
        if not self.is_broken and not self._matcher.consume_token(token_id):
            self.is_broken = True

    def take_text(self, text: str) -> bool:
        """Follow a text that was there before the reply; false where the form does not allow it."""
        for token_id in self.form.tokens.plain_ids(text):
            self.take(token_id)
        return not self.is_broken

    def copy(self) -> Matcher:
        """Another that stands where this one stands."""
        copied = Matcher(self.form, self._matcher.deep_copy())
        copied.is_broken = self.is_broken
        return copied

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end may come now."""
        return not self.is_broken and self._matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        """Whether the text so far is whole."""
        return not self.is_broken and self._matcher.is_accepting()


class _Tokens:
    """A vocabulary as llguidance wants it, made when the first form is compiled (about a second for 152,000 tokens)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.size = vocabulary.size
        self.copying = threading.Lock()
        # White space and single characters are user-defined tokens of some models; they are plain text.
        names = [name for name in vocabulary.control if len(name) > 1 and name.strip()]
        self.special = frozenset(vocabulary.control[name] for name in names)
        self._cut = re.compile("(?=(" + "|".join(map(re.escape, sorted(names, reverse=True))) + "))") if names else None

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token."""
        return [self._vocabulary.piece(token_id) for token_id in range(self.size)]

    @cached_property
    def llguidance(self) -> Any:
        """The vocabulary in llguidance's own form. A leading byte 0xFF says that a token is no text."""
        import llguidance

        ends = sorted(self._vocabulary.end_ids) or [self.size]  # none: one past the last, and no mask tells of it
        tokens = [b"\xff" + piece if i in self.special else piece for i, piece in enumerate(self.pieces)]
        tokens += [b"\xff<end>"] * (ends[-1] + 1 - self.size)
        wrapper = llguidance.TokenizerWrapper(_Wrapped(tokens, ends[0], sorted(self.special), self.plain_ids))
        return llguidance.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=ends)

    @cached_property
    def newlines(self) -> tuple[frozenset[int], Bits]:
        """The tokens that are nothing but newlines, and the same as bits."""
        ids = frozenset(i for i, piece in enumerate(self.pieces) if piece and not piece.strip(b"\n"))
        return ids, ~self.bits(but=ids)

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens are only text."""
        starts = [found.start() + 1 for found in self._cut.finditer(text)] if self._cut else []
        cuts = zip([0, *starts], [*starts, None], strict=True)
        return [token_id for a, b in cuts for token_id in self._encode(text[a:b])]

    def bits(self, *, but: Collection[int]) -> Bits:
        """A mask with every token but these."""
        allowed = np.ones(-(-self.size // 32) * 32, np.uint8)
        allowed[[i for i in but if i < self.size]] = 0
        return np.packbits(allowed, bitorder="little").view(np.uint32)

    @lru_cache(maxsize=16)  # noqa: B019 - lives as long as its model
    def never_glued(self, rest: str) -> Bits:
        """All tokens but those that begin with `rest` and go on with more than newlines."""
        start = rest.encode()
        glued = [i for i, p in enumerate(self.pieces) if p.startswith(start) and p[len(start) :].strip(b"\n")]
        return self.bits(but=glued)

    def _encode(self, text: str) -> list[int]:
        ids = self._vocabulary.encode(text)
        if b"".join(map(self._vocabulary.piece, ids)) == text.encode():
            return ids
        return list(self._longest(text.encode()))  # SentencePiece, say, puts a space in front

    def _longest(self, data: bytes) -> Iterator[int]:
        while data:
            size = next(size for size in range(min(len(data), 64), 0, -1) if data[:size] in self._by_piece)
            yield self._by_piece[data[:size]]
            data = data[size:]

    @cached_property
    def _by_piece(self) -> dict[bytes, int]:
        return {piece: i for i, piece in enumerate(self.pieces) if i not in self.special}


@dataclass(frozen=True, slots=True)
class _Wrapped:
    """What llguidance's `TokenizerWrapper` reads."""

    tokens: list[bytes]
    eos_token_id: int
    special_token_ids: list[int]
    encode: Callable[[str], list[int]]
    bos_token_id: int | None = None

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text only")
        return self.encode(text)


def _limits() -> Any:
    """What one form may cost: some tens of milliseconds to compile, a few at most for a mask, some megabytes."""
    import llguidance

    return llguidance.LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
