"""JSON schemas on their way to a grammar: what is taken out or closed, what their shortest text is, what was refused.

llguidance keeps them (`grammar.py`); here they are checked and made ready for it, and its complaints become one
sentence that names the part of the schema. Knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .errors import BadForm

_DEEPEST = 64  # levels of a schema; `$ref` may go round, it is no level
_WHITE_SPACE = r"( |\n[ \t]{0,20})?"  # between two pieces of JSON; without a bound small models indent for ever
_COMBINED = ("allOf", "anyOf", "oneOf", "$ref")
_ANNOTATIONS = {"password", "path", "file-path", "directory-path", "binary", "byte"}  # formats that say nothing of text


def schema_grammar(schema: Any) -> str:
    """A JSON schema as llguidance's grammar, for a form of its own or inside another. Raises `BadForm`."""
    import llguidance

    options: Any = {"whitespace_pattern": _WHITE_SPACE}
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    except ValueError as error:
        raise BadForm(complaint(str(error))) from None


def read_schema(text: str) -> dict[str, Any]:
    """A schema as it is compiled: an object, not too deep, without what says nothing of the text. Raises `BadForm`.

    An object that lists its properties and says nothing of others gets no others: all that it may have is still valid,
    and a small model does not go on inventing fields.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise BadForm("it is not valid JSON, or too deep") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise BadForm('a schema is an object, such as {"type": "object"}')
    return _plain(schema, (), '"allOf"' not in text)


def _plain(schema: Any, path: tuple[str, ...], close: bool) -> Any:
    """A schema without formats that are only annotations, its objects closed; its depth is checked on the way."""
    if len(path) > _DEEPEST:
        raise BadForm(f"it is more than {_DEEPEST} levels deep", ".".join(path[:4]))
    if isinstance(schema, list):
        return [_plain(item, (*path, str(i)), close) for i, item in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    if path[-1:] and path[-1] in ("const", "enum", "default", "examples") and path[-2:-1] != ("properties",):
        return schema
    if isinstance(schema.get("format"), str) and schema["format"] in _ANNOTATIONS:
        schema = {key: value for key, value in schema.items() if key != "format"}
    lists = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    combined = any(key in schema for key in _COMBINED)
    plain = {key: _plain(value, (*path, key), close and not (lists and combined)) for key, value in schema.items()}
    if close and lists and not combined and _names_all(schema):
        plain.setdefault("additionalProperties", False)
    return plain


def _names_all(schema: dict[str, Any]) -> bool:
    """Whether the properties that an object lists are enough for all else that it says."""
    names, required = schema["properties"], schema.get("required", [])
    enough = isinstance(required, list) and all(name in names for name in required if isinstance(name, str))
    return enough and _count(schema, "minProperties") <= len(names) and "patternProperties" not in schema


def part_of(schema: Any, words: str) -> str:
    """Where in a schema llguidance's complaint comes from, as keys joined by dots, as far as its words tell; else "".

    >>> part_of({"properties": {"a": {"not": {}}}}, 'Unimplemented keys: ["not"]')
    'properties.a.not'
    """
    places = [(path, value) for path, value in _walk(schema, ()) if path[-2:-1] not in (("properties",), ("$defs",))]
    named = set(re.findall(r"[$\w-]+", words))
    clues = (
        lambda key, value: isinstance(value, str) and value in named and value != "",
        lambda key, value: key == "pattern" and isinstance(value, str) and value in words,
        lambda key, value: (
            key in ("$ref", "$schema") and isinstance(value, str) and (at := _address(value)) and at in words
        ),
        lambda key, _: key in named,
        lambda key, _: key == "patternProperties" and "patternProperty" in words,
        lambda _, value: value is False and "schema is false" in words,
        lambda key, value: key == "$ref" and isinstance(value, str) and not value.startswith("#"),
    )
    found = (".".join(path) for clue in clues for path, value in places if clue(path[-1], value))
    return next(found, "")


def _address(reference: Any) -> str:
    """What a reference says before its `#`."""
    return reference.partition("#")[0] if isinstance(reference, str) else ""


def _walk(schema: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    items = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    for key, value in items:
        yield (*path, str(key)), value
        yield from _walk(value, (*path, str(key)))


def inner_schema(text: str) -> str:
    """A schema as part of a grammar: a line of JSON that says itself how it wants its white space. Raises `BadForm`."""
    return json.dumps(read_schema(text) | {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}}, ensure_ascii=False)


def shortest_text(schema: str) -> str:
    """About the shortest text that a schema allows."""
    return _Shortest(json.loads(schema)).text


class _Shortest:
    """About the shortest text that a schema allows: for knowing how much room an answer needs, so nearly is enough."""

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._left = 5_000  # schemas to look at: references may go round, and alternatives multiply
        self.text = self._of(schema, 0)

    def _of(self, schema: Any, depth: int) -> str:
        self._left -= 1
        if not isinstance(schema, dict) or depth > 24 or self._left < 0:
            return "0"
        if "const" in schema:
            return _dumped(schema["const"])
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return min(map(_dumped, schema["enum"]), key=len)
        if isinstance(schema.get("$ref"), str):
            return self._of(self._referred(schema["$ref"]), depth + 1)
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return min((self._of(member, depth + 1) for member in schema[key]), key=len)
        if isinstance(schema.get("allOf"), list) and schema["allOf"]:
            return max((self._of(member, depth + 1) for member in schema["allOf"]), key=len)
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> str:
        kinds = schema.get("type") or ("object" if "properties" in schema else "integer")
        match min(kinds, key=len, default="null") if isinstance(kinds, list) else kinds:
            case "object":
                properties, required = schema.get("properties"), schema.get("required")
                known = properties if isinstance(properties, dict) else {}
                names = required if isinstance(required, list) else []
                fields = (f"{_dumped(name)}: {self._of(known.get(str(name), {}), depth + 1)}" for name in names)
                return "{" + ", ".join(fields) + "}"
            case "array":
                prefix = schema.get("prefixItems")
                first = prefix if isinstance(prefix, list) else []
                count = min(_count(schema, "minItems"), 5_000)
                items = [*first[:count], *[schema.get("items")] * (count - len(first))]
                return "[" + ", ".join(self._of(item, depth + 1) for item in items) + "]"
            case "string":
                usual = {"date-time": 20, "date": 10, "time": 9, "uuid": 36, "email": 10, "uri": 12, "ipv6": 12}
                length = max(_count(schema, "minLength"), usual.get(str(schema.get("format")), 0))
                return '"' + "x" * min(length or (8 if "pattern" in schema else 0), 20_000) + '"'
            case "boolean":
                return "true"
            case "null":
                return "null"
            case _:
                return str(schema.get("minimum", 0))

    def _referred(self, reference: str) -> Any:
        found = self._root
        for key in reference.removeprefix("#").split("/")[1:]:
            found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _count(schema: dict[str, Any], key: str) -> int:
    return schema[key] if isinstance(schema.get(key), int) else 0


def complaint(words: str) -> str:
    """A complaint of llguidance's in one sentence; a regular expression's has the reason in its last line."""
    if unknown := re.match(r"Unimplemented keys: \[(.*)\]", words):
        return f"{unknown[1]} can't be kept while the text is written; leave it out"
    if words.startswith("oneOf"):
        return "a text may match several members of oneOf, which can't be told while it is written; say anyOf"
    if elsewhere := re.match(r"Resource '(.*)' is not present", words):
        return f"{elsewhere[1][:100]!r} is not part of the schema, and nothing is fetched; put it under $defs"
    lines = [line.strip() for line in words.strip().splitlines() if line.strip(" ^\n")]
    if not lines:
        return "it can't be compiled"
    return f"{lines[0]} {lines[-1]}" if len(lines) > 1 else lines[0]
