"""Every reply is valid by its schema: 200 schemas that nobody thought of and JSON-Schema-Test-Suite, on every backend.

The suite is not ours; it lies in the source of the PyPI package `jsonschema`. `.ci/run` unpacks it into the
environment's `share/json-schema-test-suite`; without it those tests are skipped.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from decimal import Context, Decimal, InvalidOperation, localcontext
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest

from stillhouse.backends.base import Backend, Force, GenerationRequest, LoadOptions, Only, Sampling
from stillhouse.backends.echo import Echo
from stillhouse.r1.errors import BadForm
from stillhouse.r1.grammar import Grammars
from stillhouse.r1.split import State
from stillhouse.r1.thinking import Rules, Tags, Thinking


class Model(NamedTuple):
    """A backend and what its forms are made of."""

    backend: Backend
    grammars: Grammars
    tags: Tags
    rooms: tuple[int, ...]  # max_tokens to try; a bounded schema comes to its end in the last


def echo(_: pytest.FixtureRequest) -> tuple[Backend, tuple[int, ...]]:
    """Wants to say what its prompt says."""
    return Echo(lambda ids: ids, context_length=100_000, parallel=8), (5, 40, 150, 1500)


def opened(fixture: str) -> Callable[[pytest.FixtureRequest], tuple[Backend, tuple[int, ...]]]:
    """A model whose path a fixture tells."""

    def open_it(request: pytest.FixtureRequest) -> tuple[Backend, tuple[int, ...]]:
        from stillhouse.backends.open import open_backend

        options = LoadOptions(context=1024, threads=1, parallel=8, gpu_layers=0)
        return open_backend((request.getfixturevalue(fixture),), options).backend, (12, 60)

    return open_it


def checkpoint(backend: str, *rooms: int) -> Callable[[pytest.FixtureRequest], tuple[Backend, tuple[int, ...]]]:
    """A folder of random weights, through PyTorch or MLX."""

    def open_it(request: pytest.FixtureRequest) -> tuple[Backend, tuple[int, ...]]:
        open_checkpoint, folder = (request.getfixturevalue(name) for name in ("open_checkpoint", "checkpoint_path"))
        return open_checkpoint(backend, folder, parallel=8), rooms

    return open_it


BACKENDS: dict[str, Any] = {  # one line each
    "echo": echo,
    "llama.cpp, random weights": pytest.param(opened("random_path"), marks=pytest.mark.slow),
    "llama.cpp, SmolLM2": pytest.param(opened("smollm2_path"), marks=pytest.mark.slow),
    "pytorch, random weights": pytest.param(checkpoint("pytorch", 12, 60), marks=pytest.mark.slow),
    "mlx, random weights": pytest.param(checkpoint("mlx", 12, 60), marks=pytest.mark.slow),
}


@pytest.fixture(scope="module", params=BACKENDS.values(), ids=BACKENDS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    backend, rooms = request.param(request)
    vocabulary = backend.vocabulary
    tags = Tags.of(vocabulary.control, vocabulary.end_ids, vocabulary.size, vocabulary.encode)
    yield Model(backend, Grammars(vocabulary), tags, rooms)
    backend.close()


class Told(NamedTuple):
    """The answer to one schema."""

    schema: Any
    room: int
    text: str
    finish: str


def answers(model: Model, schemas: list[Any], seed: int) -> list[Told]:
    """What the model answers to each schema: with thoughts and without, under each `max_tokens`, all in one batch."""
    asked: dict[str, tuple[Any, int]] = {}
    texts: dict[str, str] = {}
    told: list[Told] = []
    for index, schema in enumerate(schemas):
        form = model.grammars.compile("json_schema", json.dumps(schema))
        for room in model.rooms:
            for state in ("thinking", "answering"):
                draw = random.Random(f"{seed} {index} {room} {state}")
                said = ("so</think>\n\n" if state == "thinking" and draw.random() < 0.7 else "") + draw.choice(SAID)
                name = f"{index} {room} {state}"
                asked[name], texts[name] = (schema, room), ""
                model.backend.add(_request(model, name, said, state, room, form.start(), draw.randrange(2**31)))
    while len(told) < len(asked):
        for token in model.backend.step():
            texts[token.request_id] += "".join(d.text for d in token.note.deltas if d.channel == "answer")
            if token.finish:
                told.append(Told(*asked[token.request_id], texts[token.request_id], token.finish))
    return told


def _request(model: Model, name: str, said: str, state: State, room: int, grammar: Any, seed: int) -> GenerationRequest:
    steer = Thinking(model.tags, Rules(budget=20), room, state, force=Force, only=Only, grammar=grammar)
    prompt = model.backend.vocabulary.encode(said or "\n")
    return GenerationRequest(name, prompt, room, Sampling(temperature=0.8, seed=seed), steer=steer)


def wrong(told: list[Told]) -> list[Told]:
    """The answers that are called whole and are not valid."""
    return [one for one in told if one.finish == "stop" and not is_valid(one.schema, one.text)]


def is_valid(schema: Any, text: str) -> bool:
    """Whether jsonschema says so; in decimals, since 6.0131 is a multiple of 0.0001 and floats deny it.

    RFC 3339 has a year 0000, which Python's dates do not know.
    """
    text = text.replace('"0000-', '"0004-')
    kind = jsonschema.Draft202012Validator
    exact = json.loads(json.dumps(schema), parse_float=_decimal)
    try:
        with localcontext(Context(prec=1000)):
            return kind(exact, format_checker=kind.FORMAT_CHECKER).is_valid(json.loads(text, parse_float=_decimal))
    except ValueError:
        return False


def _decimal(text: str) -> Decimal | float:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond all bounds
        return float(text)


# Two hundred schemas that nobody thought of


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema with texts of bounded length, so that a model without a mind comes to an end."""
    plain: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": draw.randint(0, 8)},
        lambda: {"type": "string", "minLength": (n := draw.randint(0, 5)), "maxLength": n + draw.randint(0, 5)},
        lambda: {"type": "string", "pattern": draw.choice(["^[a-z]{1,5}$", "^(foo|bar)-[0-9]{2}$", "^\\d{4}$"])},
        lambda: {"type": "string", "format": draw.choice(["date", "uuid", "time", "ipv4"])},
        lambda: {"type": "integer", "minimum": (n := draw.randint(-50, 50)), "maximum": n + draw.randint(0, 500)},
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": ["boolean", "null"]},
        lambda: {"enum": draw.sample([1, "one", None, True, "é\n", [1, 2], {"k": "v"}, 2.5], draw.randint(1, 4))},
        lambda: {"const": draw.choice(["</think>", 'a "quoted" \\ text', 0, {"deep": [{}]}])},
    ]
    nested: list[Callable[[], dict[str, Any]]] = [
        lambda: random_object(draw, depth),
        lambda: random_object(draw, depth),
        lambda: {
            "type": "array",
            "items": random_schema(draw, depth - 1),
            "minItems": (n := draw.randint(0, 2)),
            "maxItems": n + draw.randint(0, 2),
        },
        lambda: {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]},
    ]
    return draw.choice(nested if depth == 3 else plain + nested if depth > 0 else plain)()


def random_object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(["a", "name", "with space", "é", "x-y", "type", "items", "$id ", 'q"'], draw.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: random_schema(draw, depth - 1) for name in names}}
    if names:
        schema["required"] = draw.sample(names, draw.randint(0, len(names)))
    if draw.random() < 0.6:
        schema["additionalProperties"] = False
    return schema


SCHEMAS = [random_schema(random.Random(seed)) for seed in range(200)]
SAID = [
    '{"a": "b", "name": [1, 2.5e3, null], ',
    "Sure! Here is the JSON:\n```json\n{\n  ",
    "",
    "[[{}], true]",
    "\n\n  \t",
]


BLOCKS = range(0, len(SCHEMAS), 20)


@pytest.mark.parametrize("first", BLOCKS)
def test_the_answer_to_any_schema_is_valid_or_told_as_cut(model, first):
    told = answers(model, SCHEMAS[first : first + 20], first)
    assert not wrong(told)
    assert any(one.finish == "stop" for one in told)
    roomy = [one for one in told if one.room >= 1500]
    assert {one.finish for one in roomy} <= {"stop"}, "a bounded schema did not come to an end"


# JSON-Schema-Test-Suite, the files of draft 2020-12

SUITE = Path(sys.prefix) / "share" / "json-schema-test-suite" / "tests" / "draft2020-12"
NO_SUITE = f"JSON-Schema-Test-Suite is not at {SUITE}; .ci/run unpacks it there from jsonschema's source"
FILES = sorted(path.stem for path in SUITE.glob("*.json"))
STRICTER = {  # files of the suite in which a valid text is refused, and why that is as it should be
    "allOf": "an object that lists its properties gets no others",
    "const": "members in the schema's order; 1.0 is not written where the schema says 1",
    "enum": "1.0 is not written where the schema says 1",
    "format": "formats are kept, not only noted",
    "type": "1.0 is not written where an integer is asked for",
}


def groups(name: str) -> list[dict[str, Any]]:
    return json.loads((SUITE / f"{name}.json").read_text(encoding="utf-8"))


GRAMMARS = Grammars(Echo().vocabulary)


@pytest.mark.skipif(not FILES, reason=NO_SUITE)
@pytest.mark.parametrize("name", FILES)
def test_a_schema_of_the_suite_is_kept_to_the_letter_or_refused_by_the_name_of_a_part(name):
    for group in groups(name):
        try:
            form = GRAMMARS.compile("json_schema", json.dumps(group["schema"]))
        except BadForm as error:
            assert error.part or group["schema"] is False, (group["description"], error.message)
            assert len(error.message) < 300 and "\n" not in error.message
            continue
        for test in group["tests"]:
            accepted = form.accepts(json.dumps(test["data"], ensure_ascii=False))
            assert accepted == test["valid"] or (test["valid"] and name in STRICTER), (group, test)


@pytest.mark.skipif(not FILES, reason=NO_SUITE)
def test_most_of_the_suite_that_can_be_kept_while_a_text_is_written_is_kept():
    never = {"dynamicRef", "not", "refRemote", "unevaluatedItems", "unevaluatedProperties"}
    kept = [kept_schemas(name) != [] for name in FILES if name not in never]
    assert sum(kept) > len(kept) // 2
    assert sum(len(kept_schemas(name)) for name in FILES) > 150


def kept_schemas(name: str) -> list[Any]:
    kept: list[Any] = []
    for group in groups(name):
        try:
            GRAMMARS.compile("json_schema", json.dumps(group["schema"]))
        except BadForm:
            continue
        kept.append(group["schema"])
    return kept


@pytest.mark.skipif(not FILES, reason=NO_SUITE)
@pytest.mark.parametrize("name", FILES)
def test_the_answer_to_every_schema_of_the_suite_is_valid_or_told_as_cut(model, name):
    told = answers(model._replace(rooms=model.rooms[1:3]), kept_schemas(name), len(name))
    assert not wrong(told)
