"""What a token mask costs at a model's real vocabulary, and whether it is right: llguidance next to xgrammar.

usage: python benchmarks/masks.py VOCABULARY.gguf [--library llguidance,xgrammar] [--rounds 5] [--suite FOLDER]

The file needs no weights. llguidance is asked through `stillhouse.r1.grammar`, as the server asks it; xgrammar by its
own interface, if it is installed (it wants torch). Every form is followed along texts that fit it; before each of their
tokens a mask is made. One thread. With `--suite` (the folder `tests/draft2020-12` of JSON-Schema-Test-Suite, which lies
in the source of the PyPI package `jsonschema`) both are also told every schema and every instance in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from stillhouse.r1.errors import BadForm
from stillhouse.r1.grammar import Grammars
from stillhouse.r1.tool_formats import PROMPTED
from stillhouse.r1.tools import Tool, ToolUse, form_of_calls

Kind = Literal["json_schema", "regex", "choice", "tools"]

EVENT = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 80},
        "starts": {"type": "string", "format": "date-time"},
        "kind": {"enum": ["talk", "workshop", "dinner"]},
        "seats": {"type": "integer", "minimum": 0, "maximum": 500},
        "people": {"type": "array", "items": {"type": "string"}, "maxItems": 20},
    },
    "required": ["title", "starts", "kind", "seats", "people"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "value": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name", "value", "children"],
            "additionalProperties": False,
        }
    },
}
WIDE = {
    "type": "object",
    "properties": {f"property_{i}": {"enum": [f"choice_{i}_{j}" for j in range(20)]} for i in range(150)},
    "required": [f"property_{i}" for i in range(0, 150, 5)],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4,8}$"},
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {
                            "kind": {"const": "goods"},
                            "price": {"type": "number"},
                            "text": {"type": "string"},
                        },
                        "required": ["kind", "price", "text"],
                        "additionalProperties": False,
                    },
                    {
                        "type": "object",
                        "properties": {"kind": {"const": "note"}, "text": {"type": "string", "minLength": 1}},
                        "required": ["kind", "text"],
                        "additionalProperties": False,
                    },
                ]
            },
        },
    },
    "required": ["id", "lines"],
    "additionalProperties": False,
}
WORDS = (
    "The quick brown fox jumps over the lazy dog; Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. 千里之行。 "
)

FORMS: dict[str, tuple[Kind, str, list[str]]] = {
    "5 fields, a date, an enumeration, a list": (
        "json_schema",
        json.dumps(EVENT),
        [
            json.dumps(
                {
                    "title": WORDS[:70],
                    "starts": "2026-11-25T18:30:00Z",
                    "kind": "workshop",
                    "seats": 120,
                    "people": ["Ann-Kathrin Müller", "李雷", "J. R. Hartley", "O'Neill"],
                },
                ensure_ascii=False,
            )
        ],
    ),
    "any JSON object": (
        "json_schema",
        '{"type": "object"}',
        [json.dumps({"a": [1, -2.5e3, None, True, {"b": WORDS * 3}], "c": {"d": {"e": [[], {}]}}}, ensure_ascii=False)],
    ),
    "a tree, by a reference that goes round": (
        "json_schema",
        json.dumps(TREE),
        [
            json.dumps(
                {
                    "name": "root",
                    "value": None,
                    "children": [
                        {
                            "name": f"child {i}",
                            "value": i / 3,
                            "children": [{"name": WORDS[:40], "value": 1, "children": []}],
                        }
                        for i in range(4)
                    ],
                },
                ensure_ascii=False,
            )
        ],
    ),
    "a list of one of two objects, a pattern": (
        "json_schema",
        json.dumps(ORDER),
        [
            json.dumps(
                {
                    "id": "AB-123456",
                    "lines": [{"kind": "goods", "price": 19.99, "text": WORDS}, {"kind": "note", "text": WORDS}],
                },
                ensure_ascii=False,
            )
        ],
    ),
    "150 properties of 20 choices": (
        "json_schema",
        json.dumps(WIDE),
        [json.dumps({f"property_{i}": f"choice_{i}_{i % 20}" for i in range(0, 150, 5)})],
    ),
    "a string of 2,000 characters": (
        "json_schema",
        json.dumps({"type": "string", "minLength": 2000, "maxLength": 2000}),
        [json.dumps((WORDS * 30)[:2000], ensure_ascii=False)],
    ),
    "choice: 1,000 strings": (
        "choice",
        json.dumps([f"{word} number {i}" for i in range(250) for word in ("apple", "pear", "quince", "medlar")]),
        ["quince number 137", "medlar number 9"],
    ),
    "regex: a date and a price": ("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}: \$[0-9]+\.[0-9]{2}", ["2026-11-25: $1234.56"]),
    "regex: words and lists without bounds": (
        "regex",
        r"(\w+ ?)+(, (\w+ ?)+)*\. (.*\n)*(end)?",
        ["several words here, some more there, and more. " + WORDS + "\n" + WORDS + "\nend"],
    ),
}

TOOLS = (
    Tool("get_weather", "The weather now.", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool("add_event", "Put an event into the calendar.", EVENT),
)
CALLS = "I'll look. " + WORDS + "\n" + PROMPTED.call("get_weather", '{"city": "Oslo"}')
FORMS["text, or calls of two tools"] = ("tools", "", [CALLS])


class Follower(Protocol):
    """One text as far as it has come."""

    def mask(self) -> np.ndarray: ...
    def take(self, token_id: int) -> bool: ...
    @property
    def may_end(self) -> bool: ...


class Refused(Exception):
    """The library says no to a form."""


class Library(Protocol):
    name: str

    def start(self, kind: Kind, text: str) -> Callable[[], Follower]:
        """Compile a form. Raises `Refused`."""
        ...


class Ours:
    """llguidance, as the server uses it."""

    def __init__(self, vocabulary: Any) -> None:
        import llguidance

        self.name = "llguidance " + _version(llguidance.__name__)
        self._vocabulary = vocabulary
        self._grammars = Grammars(vocabulary)
        self._grammars.compile("regex", "a")  # prepares the vocabulary

    def start(self, kind: Kind, text: str) -> Callable[[], Follower]:
        try:
            if kind == "tools":
                form = form_of_calls(ToolUse(TOOLS), PROMPTED, self._grammars, self._vocabulary.control)
            else:
                form = self._grammars.compile(kind, text)
        except BadForm as error:
            raise Refused(str(error)) from None
        return lambda: _OursFollowing(form.start())


class _OursFollowing:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.mask = matcher.mask

    def take(self, token_id: int) -> bool:
        self._matcher.take(token_id)
        return not self._matcher.is_broken

    @property
    def may_end(self) -> bool:
        return self._matcher.may_end


class Xgrammar:
    """xgrammar, by its own interface, one thread, nothing remembered."""

    def __init__(self, vocabulary: Any) -> None:
        import xgrammar

        self.name = "xgrammar " + _version("xgrammar")
        self._x = xgrammar
        hidden = frozenset(i for name, i in vocabulary.control.items() if len(name) > 1 and name.strip())
        pieces = [b"" if i in hidden else vocabulary.piece(i) for i in range(vocabulary.size)]
        info = xgrammar.TokenizerInfo(
            pieces, xgrammar.VocabType.RAW, vocab_size=vocabulary.size, stop_token_ids=sorted(vocabulary.end_ids)
        )
        self._bits = xgrammar.allocate_token_bitmask(1, vocabulary.size)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def start(self, kind: Kind, text: str) -> Callable[[], Follower]:
        try:
            match kind:
                case "json_schema":
                    compiled = self._compiler.compile_json_schema(text, strict_mode=True)
                case "regex":
                    compiled = self._compiler.compile_regex(text)
                case "choice":
                    rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
                    compiled = self._compiler.compile_grammar(f"root ::= {rule}")
                case _:
                    raise Refused("not tried")
        except RuntimeError as error:
            raise Refused(str(error).strip().splitlines()[-1]) from None
        return lambda: _XgrammarFollowing(self._x.GrammarMatcher(compiled), self._bits)


class _XgrammarFollowing:
    def __init__(self, matcher: Any, bits: Any) -> None:
        self._matcher, self._bits = matcher, bits
        self.take = matcher.accept_token

    def mask(self) -> np.ndarray:
        if not self._matcher.fill_next_token_bitmask(self._bits):
            self._bits.fill_(-1)
        return self._bits[0].numpy()

    @property
    def may_end(self) -> bool:
        return self._matcher.is_completed()


LIBRARIES: dict[str, Callable[[Any], Library]] = {"llguidance": Ours, "xgrammar": Xgrammar}


class Row(NamedTuple):
    compile_ms: float
    first_ms: float  # the first mask of a freshly compiled form
    masks_ms: list[float]
    is_right: bool  # every text was let through to its end, and no text before its end


def measure(library: Library, vocabulary: Any, kind: Kind, text: str, fitting: list[str], rounds: int) -> Row:
    masks: list[float] = []
    started = time.perf_counter()
    start = library.start(kind, text)
    compile_ms = (time.perf_counter() - started) * 1e3
    first_ms, is_right = None, True
    for fits in fitting * rounds:
        ids = plain_ids(vocabulary, fits)
        follower = start()
        for token_id in ids:
            ended = follower.may_end and kind == "json_schema"
            started = time.perf_counter()
            bits = follower.mask()
            spent = (time.perf_counter() - started) * 1e3
            if first_ms is None:
                first_ms = spent
            else:
                masks.append(spent)
            allowed = bool(int(bits[token_id // 32]) >> (token_id % 32) & 1)
            is_right = is_right and not ended and allowed and follower.take(token_id)
        is_right = is_right and follower.may_end
    return Row(compile_ms, first_ms or 0, masks, is_right)


def plain_ids(vocabulary: Any, text: str) -> list[int]:
    ids = vocabulary.encode(text)
    assert b"".join(map(vocabulary.piece, ids)) == text.encode()
    return ids


def suite_groups(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield from json.loads(path.read_text(encoding="utf-8"))


def judge(library: Library, vocabulary: Any, folder: Path) -> Counter[str]:
    """What a library makes of every schema of the suite."""
    counted: Counter[str] = Counter()
    for group in suite_groups(folder):
        try:
            start = library.start("json_schema", json.dumps(group["schema"]))
        except Refused:
            counted["schemas refused"] += 1
            continue
        counted["schemas compiled"] += 1
        wrong = False
        for test in group["tests"]:
            follower = start()
            text = json.dumps(test["data"], ensure_ascii=False)
            accepted = all(map(follower.take, plain_ids(vocabulary, text))) and follower.may_end
            counted[f"{'valid' if test['valid'] else 'invalid'} {'accepted' if accepted else 'refused'}"] += 1
            wrong = wrong or (accepted and not test["valid"])
        counted["schemas not kept"] += wrong
    return counted


def vocabulary_of(path: Path) -> Any:
    import llama_cpp

    from stillhouse.backends.llamacpp_vocabulary import LlamaVocabulary

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    llama_cpp.llama_log_set(_QUIET, None)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"{path} can't be read"
    return LlamaVocabulary(model)


def _quiet() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


_QUIET = _quiet()


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--library", default=",".join(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--suite", type=Path)
    arguments = parser.parse_args()
    vocabulary = vocabulary_of(arguments.vocabulary)
    print(f"{vocabulary.size} tokens; times in ms; {arguments.rounds} rounds\n")
    libraries = []
    for name in arguments.library.split(","):
        started = time.perf_counter()
        libraries.append(LIBRARIES[name](vocabulary))
        print(f"{libraries[-1].name}: the vocabulary is ready after {time.perf_counter() - started:.2f} s")
    columns = ("form", "library", "compile", "first mask", "mean", "p50", "p99", "longest", "right")
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for form, (kind, text, fitting) in FORMS.items():
        for library in libraries:
            try:
                row = measure(library, vocabulary, kind, text, fitting, arguments.rounds)
            except Refused as error:
                print(f"| {form} | {library.name} | refused: {error} | | | | | | |")
                continue
            p50, p99 = np.percentile(row.masks_ms, [50, 99])
            print(
                f"| {form} | {library.name} | {row.compile_ms:.1f} | {row.first_ms:.2f} | "
                f"{np.mean(row.masks_ms):.3f} | {p50:.3f} | {p99:.3f} | "
                f"{max(row.masks_ms):.2f} | {'yes' if row.is_right else 'NO'} |",
                flush=True,
            )
    if arguments.suite:
        for library in libraries:
            print(f"\n{library.name} and JSON-Schema-Test-Suite:")
            for what, count in sorted(judge(library, vocabulary, arguments.suite).items()):
                print(f"  {count:4} {what}")


if __name__ == "__main__":
    main()
