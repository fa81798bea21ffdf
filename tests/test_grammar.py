"""Answers of a given form: the mask begins where the answer does, and what it lets through is what was asked for."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from stillhouse.backends.base import Backend, Force, GenerationRequest, Only, Sampling
from stillhouse.backends.echo import Echo, EchoVocabulary
from stillhouse.r1.errors import BadForm
from stillhouse.r1.grammar import ANY_OBJECT, Form, Grammars
from stillhouse.r1.thinking import Outcome, Rules, Tags, Thinking

VOCABULARY = EchoVocabulary()
GRAMMARS = Grammars(VOCABULARY)
TAGS = Tags.of(VOCABULARY.control, VOCABULARY.end_ids, VOCABULARY.size, VOCABULARY.encode)

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


def schema_form(schema: Any) -> Form:
    return GRAMMARS.compile("json_schema", json.dumps(schema))


def answer(
    said: str,
    form: Form,
    rules: Rules | None = None,
    *,
    state: str = "thinking",
    room: int = 1000,
    seed: int | None = None,
    ignore_eos: bool = False,
) -> tuple[str, str, Outcome, str]:
    """What a model that wants to say `said` is heard to say under a form: thoughts, answer, outcome, reason to end."""
    rules = rules or Rules(break_loops=False)
    thinking = Thinking(TAGS, rules, room, state, force=Force, only=Only, grammar=form.start())
    backend = Echo(lambda _: VOCABULARY.encode(said), context_length=100_000)
    sampling = Sampling(temperature=0 if seed is None else 1, seed=seed)
    backend.add(GenerationRequest("a", [1], room, sampling, steer=thinking, ignore_eos=ignore_eos))
    return heard(backend)


def heard(backend: Backend) -> tuple[str, str, Outcome, str]:
    texts = {"reasoning": "", "answer": ""}
    while True:
        for token in backend.step():
            for delta in token.note.deltas:
                texts[delta.channel] += delta.text
            if token.finish:
                return texts["reasoning"], texts["answer"], token.note.outcome, token.finish


# Where the mask begins and ends

PLACES = {
    "after the thoughts": ('{"no</think>\n\n{"name": "Bo", "age": 4}', "thinking", '{"no', '{"name": "Bo", "age": 4}'),
    "after empty thoughts": ('</think>\n\n{"name": "Bo", "age": 4}', "thinking", "", '{"name": "Bo", "age": 4}'),
    "without thoughts": ('{"name": "Bo", "age": 4}', "answering", "", '{"name": "Bo", "age": 4}'),
    "after thoughts the model opened": (
        '<think>\nhm</think>\n\n{"name": "Bo", "age": 4}',
        "undecided",
        "hm",
        '{"name": "Bo", "age": 4}',
    ),
    "where none were opened": ('{"name": "Bo", "age": 4}', "undecided", "", '{"name": "Bo", "age": 4}'),
    "where the model wants to say more": (
        'hm</think>\n\nSure! {"name": "Bo", "age": 4} Glad to help.',
        "thinking",
        "hm",
        '{"name": "! {", "age": 4}',
    ),
}


@pytest.mark.parametrize(("said", "state", "reasoning", "text"), PLACES.values(), ids=PLACES)
def test_the_form_holds_from_the_first_token_of_the_answer(said, state, reasoning, text):
    thoughts, told, _, finish = answer(said, schema_form(PERSON), state=state)
    assert (thoughts, finish) == (reasoning, "stop")
    jsonschema.validate(json.loads(told), PERSON)
    if "Sure" not in said:
        assert told == text


def test_a_budget_closes_the_thoughts_and_the_form_begins():
    form = schema_form({"enum": ["yes"]})
    _, text, outcome, finish = answer("hm " * 200, form, Rules(budget=50, break_loops=False))
    assert (text, outcome.closed_by, finish) == ('"yes"', "budget", "stop")


def test_the_reply_ends_with_the_form_even_where_the_end_is_ignored():
    assert answer("hm</think>\n\nabc", GRAMMARS.compile("regex", "abc"), ignore_eos=True)[1::2] == ("abc", "stop")


def test_a_form_that_ends_with_the_last_token_there_is_room_for_is_done():
    assert answer("abc", GRAMMARS.compile("regex", "abc"), state="answering", room=3)[1::2] == ("abc", "stop")


def test_a_text_that_may_begin_with_newlines_keeps_them():
    form = GRAMMARS.compile("regex", "\n{3}a")
    assert answer("\n\n\na", form, state="answering")[1] == "\n\n\na"
    assert answer("hm</think>\n\n\n\n\na", form)[1] == "\n\n\na"


@pytest.mark.parametrize("room", [*range(1, 12), 20, 30, 40, 60, 100, 200])
def test_under_any_max_tokens_it_is_valid_or_told_as_cut(room):
    _, text, _, finish = answer("thoughts without an end " * 50, schema_form(PERSON), room=room, seed=room)
    assert finish == "length" or jsonschema.validate(json.loads(text), PERSON) is None
    assert room < 120 or finish == "stop"


def test_the_reserve_is_at_least_what_the_shortest_text_needs():
    form = schema_form({"type": "string", "minLength": 300, "maxLength": 300})
    assert form.least_tokens > 302
    _, text, outcome, finish = answer("on and on " * 100, form, Rules(reserve=10, break_loops=False), room=500)
    assert (len(json.loads(text)), outcome.closed_by, finish) == (300, "reserve", "stop")


def test_a_stop_string_inside_a_text_that_is_not_whole_is_text():
    said = '{"name": "a STOP b", "age": 1}'
    told = answer(said, schema_form(PERSON), Rules(stops=("STOP",)), state="answering")
    assert (told[1], told[3]) == (said, "stop")


def test_a_stop_string_ends_a_text_that_is_whole_before_it():
    form = GRAMMARS.compile("regex", "[a-zA-Z ]+")
    assert answer("one STOP two", form, Rules(stops=("STOP",)), state="answering")[1::2] == ("one ", "stop")


def test_many_stop_strings_that_never_end_anything_cost_little():
    form = schema_form({"type": "string", "minLength": 3000, "maxLength": 3000})
    started = time.monotonic()
    answer('"' + "ab" * 1500 + '"', form, Rules(stops=("a", "b")), state="answering", room=3100)
    assert time.monotonic() - started < 10


# Forms

FORMS: dict[str, tuple[Any, str, Callable[[str], Any]]] = {
    "any object": ("json_schema", ANY_OBJECT, lambda text: isinstance(json.loads(text), dict)),
    "a schema": ("json_schema", json.dumps(PERSON), lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
    "a regular expression": ("regex", "[0-9]{3}-[a-f]+", lambda text: re.fullmatch("[0-9]{3}-[a-f]+", text)),
    "choices": (
        "choice",
        '["yes", "yes and no", "\U0001f600 \\"é\\""]',
        ["yes", "yes and no", '\U0001f600 "é"'].__contains__,
    ),
    "Lark's notation": ("grammar", 'start: "a" B+\nB: /[bc]/', lambda text: re.fullmatch("a[bc]+", text)),
    "llama.cpp's notation": ("grammar", 'root ::= "a" [bc]+', lambda text: re.fullmatch("a[bc]+", text)),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kind", "text", "fits"), FORMS.values(), ids=FORMS)
def test_every_kind_of_form_is_kept(kind, text, fits, seed):
    said = random.Random(seed).choice(["", "hm</think>\n\n"]) + '{"a": 1} yes 123-abc'
    told = answer(said, GRAMMARS.compile(kind, text), state="thinking", seed=seed, room=600)
    assert told[3] == "length" or fits(told[1])


@pytest.mark.parametrize("tag", ["</think>", "<think>", "<|end|>", "<｜User｜>"])
def test_a_control_token_in_a_form_is_text(tag):
    form = schema_form({"const": f"a {tag} b"})
    matcher = form.start()
    for token_id in form.tokens.plain_ids(f'"a {tag} b"'):
        allowed = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
        assert not any(allowed[i] for i in VOCABULARY.control.values())
        assert allowed[token_id]
        matcher.take(token_id)
    assert matcher.is_complete
    assert answer(f'hm</think>\n\n"a {tag} b"', form)[1] == f'"a {tag} b"'


@pytest.mark.parametrize("grammar", ["start: <think>", 'start: <[260]> "a"'])
def test_a_grammar_cannot_name_a_control_token(grammar):
    with pytest.raises(BadForm, match="control tokens"):
        GRAMMARS.compile("grammar", grammar)


def test_a_form_that_leads_to_a_dead_end_is_cut_and_not_broken():
    """A grammar that names a control token in its middle allows nothing there; all requests of the batch were lost."""
    form = GRAMMARS.compile("grammar", 'start: "ab" <think> "c"')
    assert answer("abc", form, state="answering")[1::2] == ("ab", "length")


# Schemas

SUPPORTED: dict[str, Any] = {
    "a bare type": {"type": "boolean"},
    "several types": {"type": ["integer", "null"]},
    "an enumeration": {"enum": [1, "two", None, {"a": [True]}]},
    "a constant": {"const": {"a": [1, None]}},
    "bounds": {"type": "integer", "minimum": -5, "exclusiveMaximum": 17},
    "bounds of fractions": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "multiples": {"type": "integer", "multipleOf": 7},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "a pattern": {"type": "string", "pattern": "^[a-c]{2,4}x$"},
    "a date": {"type": "string", "format": "date-time"},
    "a uuid": {"type": "string", "format": "uuid"},
    "an address": {"type": "string", "format": "ipv4"},
    "a format that says nothing": {"type": "string", "format": "password", "maxLength": 4},
    "a list": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
    "a tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    "optional properties": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}},
        "required": ["b"],
    },
    "other properties": {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "additionalProperties": {"type": "boolean"},
        "required": ["a"],
        "maxProperties": 2,
    },
    "a property that is only required": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["z"]},
    "patterns of names": {
        "type": "object",
        "patternProperties": {"^x{1,3}$": {"type": "null"}},
        "additionalProperties": False,
    },
    "one of two": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    "exactly one of two": {"oneOf": [{"type": "null"}, {"type": "boolean"}]},
    "a union that is told apart": {
        "discriminator": {"propertyName": "kind"},
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": k}, "n": {"type": t}}, "required": ["kind", "n"]}
            for k, t in (("a", "null"), ("b", "boolean"))
        ],
    },
    "all of two": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "maxProperties": 2},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "a reference that goes round": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["next"],
            }
        },
    },
    "words for people": {"title": "T", "description": "D", "examples": [1], "default": 2, "x-mine": 3, "type": "null"},
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schema", SUPPORTED.values(), ids=SUPPORTED)
def test_what_json_schema_has_is_kept(schema, seed):
    _, text, _, finish = answer("", schema_form(schema), state="answering", seed=seed, room=800)
    assert finish == "length" or jsonschema.validate(json.loads(text), schema) is None, text


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "what it is not": ({"properties": {"a": {"not": {"type": "string"}}}}, "properties.a.not"),
    "a condition": ({"if": {}, "then": {}}, "if"),
    "no two alike": ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "items.uniqueItems"),
    "a format nobody knows": ({"properties": {"a": {"type": "string", "format": "foo"}}}, "properties.a.format"),
    "a type nobody knows": ({"properties": {"a": {"type": "text"}}}, "properties.a.type"),
    "a broken pattern": ({"$defs": {"x": {"type": "string", "pattern": "(("}}, "$ref": "#/$defs/x"}, "$defs.x.pattern"),
    "a look ahead": ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
    "members that overlap": ({"items": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "items.oneOf"),
    "another server's schema": ({"$ref": "http://example.com/schema"}, "$ref"),
    "nothing that could be": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "a circle": ({"$ref": "#"}, ""),
    "nothing at all": (False, ""),
    "a list": ([1], ""),
    "a number too large": ({"type": "integer", "minimum": 10**400}, ""),
}


@pytest.mark.parametrize(("schema", "part"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_cannot_be_kept_is_named(schema, part):
    with pytest.raises(BadForm) as refused:
        schema_form(schema)
    assert refused.value.part == part
    assert "\n" not in str(refused.value)


TOO_MUCH = {
    "long": ("json_schema", json.dumps({"enum": ["x" * 200] * 1000})),
    "deep": ("json_schema", '{"items":' * 200 + "{}" + "}" * 200),
    "deeper than a parser goes": ("json_schema", '{"items":' * 10_000 + "{}" + "}" * 10_000),
    "alternatives that multiply": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(10)]} for i in range(6)]}),
    ),
}


@pytest.mark.parametrize(("kind", "text"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_form_that_would_cost_too_much_is_refused_at_once(kind, text):
    started = time.monotonic()
    with pytest.raises(BadForm):
        GRAMMARS.compile(kind, text)
    assert time.monotonic() - started < 2


def test_a_form_is_compiled_once():
    first = GRAMMARS.compile("regex", "once")
    assert GRAMMARS.compile("regex", "once") is first
    for n in range(100):
        GRAMMARS.compile("regex", f"many{n}")
    assert GRAMMARS.compile("regex", "once") is not first


def test_an_object_that_lists_its_properties_has_no_others_unless_it_says_so():
    listed = {"type": "object", "properties": {"a": {"type": "null"}}}
    assert not schema_form(listed).accepts('{"a": null, "b": 1}')
    assert schema_form(listed | {"additionalProperties": True}).accepts('{"a": null, "b": 1}')


# What it costs


@pytest.mark.slow
def test_a_mask_costs_less_than_a_millisecond_at_r1s_vocabulary(r1_vocabulary_path):
    import llama_cpp

    from stillhouse.backends.llamacpp_vocabulary import LlamaVocabulary

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    r1_vocabulary = LlamaVocabulary(llama_cpp.llama_model_load_from_file(str(r1_vocabulary_path).encode(), params))
    grammars = Grammars(r1_vocabulary)
    matcher = grammars.compile("json_schema", json.dumps(PERSON | {"additionalProperties": True})).start()
    spent = []
    for token_id in r1_vocabulary.encode(
        '{"name": "Ann-Kathrin", "age": 37, "more": {"of": ["all", "kinds"], "x": 1.5}}'
    ):
        started = time.perf_counter()
        bits = matcher.mask()
        spent.append(time.perf_counter() - started)
        assert bits[token_id // 32] >> (token_id % 32) & 1
        matcher.take(token_id)
    assert matcher.may_end
    assert sum(spent) / len(spent) < 1e-3
