"""Cases 26 to 33: what a request wants of the answer, and of the answer only."""

from __future__ import annotations

import json
from typing import Any

from .cases_split import CLOSE, FOUR, PLUS, TWO, count_up, steered
from .client import Reply
from .suite import case
from .target import END, Fail, NotApplicable, Target, expect

_SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"enum": ["yes", "no"]}}, "required": ["word"]},
    },
}


def fits(content: str) -> bool:
    """Whether an answer is what the schema allows."""
    try:
        return json.loads(content) in ({"answer": "yes"}, {"answer": "no"})
    except ValueError:
        return False


@case(26, "a schema for the answer")
def a_schema_for_the_answer(target: Target) -> str:
    """Are the thoughts free and the answer held to a JSON schema, in one request?"""
    target.need_thoughts()
    if target.is_scripted:
        kept = target.say(f'{{"a" or two{CLOSE}\n\n{{"answer": "no"}}', **target.schema(_SCHEMA))
        expect(kept.reasoning == '{"a" or two' and kept.content == '{"answer": "no"}', kept.shown())
        reply = target.say(f"two{CLOSE}\n\nnot JSON at all", **target.schema(_SCHEMA), max_tokens=200)
    else:
        reply = _then_free(target, TWO, **target.schema(_SCHEMA))
    expect(bool(reply.reasoning) and fits(reply.content), reply.shown())
    return reply.shown()


@case(27, "a schema without thoughts")
def a_schema_without_thoughts(target: Target) -> str:
    """Does the schema hold where the thoughts are empty or switched off?"""
    replies = []
    if target.is_scripted:
        for fields in target.ways_without_thoughts:
            replies.append(target.say("not JSON at all", **target.schema(_SCHEMA), max_tokens=200, **fields))
        replies.append(target.say(f"\n\n{CLOSE}\n\nnot JSON at all", **target.schema(_SCHEMA), max_tokens=200))
    elif not target.thinks:
        replies.append(target.ask("Is two even?", max_tokens=96, **target.schema(_SCHEMA)))
    else:
        replies.append(_then_free(target, **target.schema(_SCHEMA)))
    for reply in replies:
        expect(fits(reply.content), reply.shown())
    return replies[-1].shown()


@case(28, "a schema under speculation")
def a_schema_under_speculation(target: Target) -> str:
    """Does the schema hold where tokens are drafted several at a time?"""
    target.need_thinking()
    reply = target.ask("Is two even?", max_tokens=48)
    if not (reply.head.get("timings") or {}).get("draft_n"):
        raise NotApplicable("no sign of speculative decoding")
    reply = _then_free(target, TWO, **target.schema(_SCHEMA))
    expect(bool(reply.reasoning) and fits(reply.content), reply.shown())
    return reply.shown()


@case(29, "room for the schema")
def room_for_the_schema(target: Target) -> str:
    """Is there valid JSON, or an error that says why not, where the thoughts take it all?"""
    target.need_thoughts()
    if target.is_scripted:
        reply = target.say(count_up(200), **target.schema(_SCHEMA), max_tokens=120)
    else:
        reply = target.ask("Is there a largest prime? Prove it.", max_tokens=64, **target.schema(_SCHEMA))
    told = any(reply.head.get(name) for name in ("error", "incomplete_details", "warnings"))
    expect(fits(reply.content) or (reply.finish == "length" and told), f"neither: {reply.shown()}")
    return reply.shown()


@case(30, "a tool call in the thoughts")
def a_tool_call_in_the_thoughts(target: Target) -> str:
    """Is a call that is only thought of left in the thoughts, and not made?"""
    if not target.is_scripted:
        raise NotApplicable("a real model cannot be made to write a call into its thoughts")
    for call in (
        '<tool_call>{"name": "look_up", "arguments": {"word": "yes"}}</tool_call>',
        '{"tool": "look_up", "arguments": {"word": "yes"}}',
    ):
        reply = target.say(f"I could say {call}{CLOSE}\n\nnot now", tools=[_TOOL])
        expect(not reply.tool_calls, f"it was made: {reply.tool_calls}")
        expect(call in reply.reasoning and reply.finish == "stop", reply.shown())
    return reply.shown()


@case(31, "tools for a model that has none")
def tools_for_a_model_that_has_none(target: Target) -> str:
    """Is a required tool call one that parses, after free thoughts?"""
    target.need_thoughts()
    fields: dict[str, Any] = {"tools": [_TOOL], "tool_choice": "required"}
    if target.is_scripted:
        reply = target.say(f"two{CLOSE}\n\nnot a call at all", max_tokens=300, **fields)
    else:
        reply = _then_free(target, TWO, **fields)
    expect(bool(reply.reasoning), f"no thoughts: {reply.shown()}")
    expect(len(reply.tool_calls) >= 1, f"no call: {reply.shown()}")
    function = reply.tool_calls[0].get("function") or {}
    try:
        word = json.loads(function.get("arguments") or "").get("word")
    except (ValueError, AttributeError):
        raise Fail(f"the call does not parse: {function}") from None
    expect(function.get("name") == "look_up" and word in ("yes", "no"), f"not the tool's: {function}")
    return f"{function['name']}({function['arguments']})"


@case(32, "a stop string in the thoughts")
def a_stop_string_in_the_thoughts(target: Target) -> str:
    """Do stop strings end the answer only?"""
    target.need_thinking()
    if target.is_scripted:
        script = f"one STOP two{CLOSE}\n\nfour STOP five"
        reply = target.say(script, stop=["STOP"])
        expect((reply.reasoning, reply.content, reply.finish) == ("one STOP two", "four ", "stop"), reply.shown())
        everywhere = target.say(script, stop="STOP", stop_scope="all")
        expect((everywhere.reasoning, everywhere.content) == ("one ", ""), f"scope all: {everywhere.shown()}")
        return reply.shown()
    steered(target.steer(TWO, PLUS, CLOSE, FOUR, END), "two", "plus", "four")
    reply = target.steer(TWO, PLUS, CLOSE, FOUR, END, stop=[" plus"])
    expect(
        "plus" in reply.reasoning + reply.content and "four" in reply.content,
        f"it fired in the thoughts: {reply.shown()}",
    )
    return reply.shown()


@case(33, "penalties and the thoughts")
def penalties_and_the_thoughts(target: Target) -> str:
    """Can repetition penalties leave out what was thought when the answer is drawn?"""
    target.need_thoughts()
    if target.is_scripted:
        # Each `e` weighs 2 more against the next: four in the thoughts and three in the answer can be borne apart only.
        reply = target.say(f"eabecdefge{CLOSE}\n\nehiejke", frequency_penalty=2, presence_penalty=2)
        expect((reply.reasoning, reply.content) == ("eabecdefge", "ehiejke"), f"the answer is bent: {reply.shown()}")
        return reply.shown()
    bias = {str(target.token_id(word)): weight for word, weight in ((TWO, 100), (CLOSE, 75), (FOUR, 45))}
    reply = target.both(target.steered(TWO, CLOSE, logit_bias=bias, max_tokens=24, penalty_scope="answer"))
    steered(reply, "two")
    if CLOSE not in reply.content and not reply.content:
        raise NotApplicable(f"the model could not be steered: {reply.shown()}")
    expect(reply.content.lstrip().startswith("two"), f"the thought word is held against the answer: {reply.shown()}")
    return reply.shown()


def _then_free(target: Target, *thought: str, **fields: Any) -> Reply:
    """A few steered thoughts, closed, and then an answer that only the request's constraint rules."""
    try:
        return target.both(target.steered(*thought, CLOSE, max_tokens=160, **fields))
    except NotApplicable:
        if not thought:
            raise
    return target.ask("Is two even?", max_tokens=160, **target.budget(24), **fields)
