"""What bad input gets: one sentence in OpenAI's error object, and never a 5xx."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import server_fixtures as fixtures
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stillhouse.server.others import HARMLESS, MUST_BE_TRUE, REFUSED

said, plain = fixtures.said, fixtures.plain

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server():
    with fixtures.in_process(context=512, max_body=1024 * 1024) as server:
        yield server


def refused(response: httpx.Response, *, kind: str = "invalid_request_error") -> tuple[int, Any, Any, str]:
    """Status, param, code and message of an error, which has OpenAI's shape and one readable line."""
    body = response.json()
    error = body["error"]
    assert (set(body), set(error)) == ({"error"}, {"message", "type", "param", "code"})
    assert error["type"] == kind
    message = error["message"]
    assert message == message.strip() and message.isprintable() and 8 <= len(message) <= 400, message
    for leak in ("Traceback", "pydantic", "ValidationError", ".py", "Value error"):
        assert leak not in message
    return response.status_code, error["param"], error["code"], message


# Bodies that are no JSON of ours

MESSAGES = b'"messages": [{"role": "user", "content": "a"}]'
BODIES = {
    "empty": (b"", None, "invalid_json", "EOF"),
    "cut off": (b'{"messages": [', None, "invalid_json", "EOF"),
    "something after it": (b"{%s} x" % MESSAGES, None, "invalid_json", "trailing"),
    "a comment": (b"{%s /* x */}" % MESSAGES, None, "invalid_json", ""),
    "single quotes": (b"{'messages': []}", None, "invalid_json", ""),
    "half a surrogate": (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', None, "invalid_json", "hex escape"),
    "bytes that are no UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', None, "invalid_json", ""),
    "UTF-16": ((b"{%s}" % MESSAGES).decode().encode("utf-16"), None, "invalid_json", ""),
    "a byte order mark": (b"\xef\xbb\xbf{%s}" % MESSAGES, None, "invalid_json", ""),
    "a control character in a string": (
        b'{"messages": [{"role": "user", "content": "\x00"}]}',
        None,
        "invalid_json",
        "",
    ),
    "a list": (b"[%s]" % b"{}", None, "invalid_value", "object"),
    "a string": (b'"hello"', None, "invalid_value", "object"),
    "null": (b"null", None, "invalid_value", "object"),
    "100,000 lists deep": (
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        None,
        "invalid_json",
        "recursion",
    ),
    "100,000 objects deep, in a field nobody knows": (
        b'{%s, "x": ' % MESSAGES + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        None,
        "invalid_json",
        "recursion",
    ),
    "a number of 5,000 digits": (b'{%s, "seed": %s}' % (MESSAGES, b"9" * 5000), None, "invalid_json", "number"),
    "5,000 digits where a count should be": (
        b'{%s, "n": %s}' % (MESSAGES, b"9" * 5000),
        None,
        "invalid_json",
        "number",
    ),
    "NaN": (b'{%s, "temperature": NaN}' % MESSAGES, "temperature", "invalid_value", "finite"),
    "Infinity": (b'{%s, "temperature": Infinity}' % MESSAGES, "temperature", "invalid_value", "finite"),
    "-Infinity": (b'{%s, "top_p": -Infinity}' % MESSAGES, "top_p", "invalid_value", "finite"),
    "1e999": (b'{%s, "temperature": 1e999}' % MESSAGES, "temperature", "invalid_value", ""),
    "NaN in a bias": (b'{%s, "logit_bias": {"1": NaN}}' % MESSAGES, "logit_bias.1", "invalid_value", "finite"),
    "NaN for a whole number": (b'{%s, "max_tokens": NaN}' % MESSAGES, "max_tokens", "invalid_value", ""),
}


@pytest.mark.parametrize(("body", "param", "code", "word"), BODIES.values(), ids=BODIES)
def test_a_body_that_cannot_be_read_is_told_why(server, body, param, code, word):
    response = server.request("POST", CHAT, content=body, headers=JSON)
    status, told_param, told_code, message = refused(response)
    assert (status, told_param, told_code) == (400, param, code)
    assert word in message


def filled(before: bytes, item: bytes, after: bytes) -> bytes:
    """A body of nearly the largest size there is."""
    return before + item * ((900_000 - len(before)) // len(item)) + item.rstrip(b",") + after


CONTENT = b'{"messages": [{"role": "user", "content": ['
MANY = {
    "tokens": ("/detokenize", filled(b'{"tokens": [', b'"",', b"]}")),
    "prompts": (COMPLETIONS, filled(b'{"prompt": [', b"{},", b"]}")),
    "lists of prompts": (COMPLETIONS, filled(b'{"prompt": [', b'["a"],', b"]}")),
    "parts": (CHAT, filled(CONTENT, b"1,", b"]}]}")),
    "messages": (CHAT, filled(b'{"messages": [', b"{},", b"]}")),
    "calls": (CHAT, filled(b'{"messages": [{"role": "assistant", "tool_calls": [', b"{},", b"]}]}")),
    "stop strings": (CHAT, filled(b'{%s, "stop": [' % MESSAGES, b"1,", b"]}")),
    "biases": (CHAT, filled(b'{%s, "logit_bias": {"a": 0' % MESSAGES, b', "a": 0', b"}}")[:-9] + b"}}"),
    "variables": (
        CHAT,
        b'{%s, "chat_template_kwargs": {%s}}' % (MESSAGES, b",".join(b'"%d": []' % i for i in range(50_000))),
    ),
}


@pytest.mark.parametrize(("path", "body"), MANY.values(), ids=MANY)
def test_a_body_of_nothing_but_mistakes_is_one_error(server, path, body):
    """A body of 8 MB with millions of mistakes kept everybody waiting for up to 9 s while they were counted."""
    started = time.process_time()
    assert refused(server.request("POST", path, content=body, headers=JSON))[0] == 400
    assert time.process_time() - started < 0.5


# Fields that are wrong

FIELDS = {
    "a number as text": ({"max_tokens": "5"}, "max_tokens", "integer"),
    "a number as text, a fraction": ({"temperature": "0.5"}, "temperature", "number"),
    "true for a number": ({"max_tokens": True}, "max_tokens", "integer"),
    "true for a fraction": ({"temperature": True}, "temperature", "number"),
    "a fraction for a whole number": ({"n": 1.5}, "n", "integer"),
    "a number for a switch": ({"stream": 1}, "stream", "boolean"),
    "text for a switch": ({"logprobs": "true"}, "logprobs", "boolean"),
    "a list for an object": ({"stream_options": []}, "stream_options", "object"),
    "a wrong option of the stream": (
        {"stream_options": {"include_usage": "yes"}},
        "stream_options.include_usage",
        "bool",
    ),
    "a number for a name": ({"model": 5}, "model", "string"),
    "a number for a stop string": ({"stop": 5}, "stop", ""),
    "a prompt beside messages": ({"prompt": "a"}, "prompt", "say messages"),
    "an echo of the prompt": ({"echo": True}, "echo", "/v1/completions"),
    "the best of some": ({"best_of": 4}, "best_of", "say n"),
    "a number among stop strings": ({"stop": ["a", 5]}, "stop.1", "string"),
    "a negative max_tokens": ({"max_tokens": -1}, "max_tokens", "1"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens", "1"),
    "a negative temperature": ({"temperature": -0.1}, "temperature", "0"),
    "a temperature of 6": ({"temperature": 6}, "temperature", "5"),
    "top_p 0": ({"top_p": 0}, "top_p", "0"),
    "top_p 1.01": ({"top_p": 1.01}, "top_p", "1"),
    "min_p 2": ({"min_p": 2}, "min_p", "1"),
    "a penalty of 3": ({"presence_penalty": 3}, "presence_penalty", "2"),
    "a repetition penalty of 0": ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    "n 0": ({"n": 0}, "n", "1"),
    "n of a thousand": ({"n": 1000}, "n", "64"),
    "n of 10 to the 9th": ({"n": 10**9}, "n", "64"),
    "a seed of 70 bits": ({"seed": 2**70}, "seed", "18446744073709551616"),
    "17 stop strings": ({"stop": list("abcdefghijklmnopq")}, "stop", "at most 16"),
    "an empty stop string": ({"stop": ["a", ""]}, "stop", "1 to 1000"),
    "a stop string of 1,001 letters": ({"stop": "x" * 1001}, "stop", "1 to 1000"),
    "a bias for no token": ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is not a token id"),
    "a bias for a negative token": ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1' is not a token id"),
    "a bias for a digit of another script": ({"logit_bias": {"٣": 1}}, "logit_bias", "is not a token id"),
    "a bias for a token that is not there": ({"logit_bias": {"262": 1}}, "logit_bias", "the last is 261"),
    "a bias of 1,000": ({"logit_bias": {"5": 1000}}, "logit_bias.5", "100"),
    "a bias for 1,025 tokens": ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    "top_logprobs without logprobs": ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    "21 top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    "functions": ({"functions": [{"name": "f"}]}, "functions", "say tools"),
    "a format nobody knows": ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
    "sound": ({"modalities": ["text", "audio"]}, "modalities", "text only"),
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "null for messages": ({"messages": None}, "messages", "array"),
    "text for messages": ({"messages": "hello"}, "messages", "array"),
    "a text among messages": ({"messages": ["hello"]}, "messages.0", "object"),
    "an unknown role": ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role", "'user'"),
    "no role": ({"messages": [{"content": "a"}]}, "messages.0.role", "required"),
    "a number for content": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", ""),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
        "messages.0.content",
        "text only",
    ),
    "a text part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content",
        "needs a field 'text'",
    ),
    "a part without a type": (
        {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
        "messages.0.content.0.type",
        "",
    ),
}


@pytest.mark.parametrize(("fields", "param", "words"), FIELDS.values(), ids=FIELDS)
def test_a_wrong_field_is_named_with_its_limit(server, fields, param, words):
    status, told_param, code, message = refused(server.post(CHAT, plain("a") | fields))
    assert (status, told_param) == (400, param)
    assert code in ("invalid_value", "missing_required_parameter", None)
    assert words in message


def test_a_missing_field_is_named(server):
    answers = [refused(server.post(path, {})) for path in (CHAT, COMPLETIONS, "/detokenize")]
    assert [answer[1:] for answer in answers] == [
        (field, "missing_required_parameter", f"{field} is required") for field in ("messages", "prompt", "tokens")
    ]


TEXT_FIELDS = {
    "two prompts": ({"prompt": ["a", "b"]}, "prompt", "one prompt a request; these are 2"),
    "no prompt in a list": ({"prompt": []}, "prompt", "empty"),
    "an empty list of ids": ({"prompt": [[]]}, "prompt", "empty"),
    "a token that is not there": ({"prompt": [262]}, "prompt", "from 0 to 261"),
    "a negative token": ({"prompt": [-1]}, "prompt", "from 0 to 261"),
    "a token of 70 bits": ({"prompt": [2**70]}, "prompt", "from 0 to 261"),
    "an object": ({"prompt": {"text": "a"}}, "prompt", ""),
    "a suffix": ({"prompt": "a", "suffix": "b"}, "suffix", "filled in"),
    "a form": ({"prompt": "a", "regex": "b"}, "regex", "/v1/chat/completions"),
    "a budget": ({"prompt": "a", "thinking_budget": 5}, "thinking_budget", "/v1/chat/completions"),
    "messages": ({"prompt": "a", "messages": [{"role": "user"}]}, "messages", "/v1/chat/completions"),
    "best_of": ({"prompt": "a", "best_of": 3}, "best_of", "must equal n"),
    "an echo with logprobs": ({"prompt": "a", "echo": True, "logprobs": 1}, "echo", "not served"),
    "logprobs as a switch": ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
}


@pytest.mark.parametrize(("body", "param", "words"), TEXT_FIELDS.values(), ids=TEXT_FIELDS)
def test_a_wrong_field_of_a_completion_is_named(server, body, param, words):
    status, told_param, _, message = refused(server.post(COMPLETIONS, body))
    assert (status, told_param, words in message) == (400, param, True), message


TOKENS = {
    "neither text nor messages": ("/tokenize", {}, "content"),
    "both": ("/tokenize", {"content": "a", "messages": [{"role": "user", "content": "a"}]}, "content"),
    "no messages": ("/tokenize", {"messages": []}, "messages"),
    "a token that is not there": ("/detokenize", {"tokens": [262]}, "tokens"),
    "a negative token": ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    "text for tokens": ("/detokenize", {"tokens": "a"}, "tokens"),
}


@pytest.mark.parametrize(("path", "body", "param"), TOKENS.values(), ids=TOKENS)
def test_what_is_no_text_and_no_tokens_is_refused(server, path, body, param):
    assert refused(server.post(path, body))[:2] == (400, param)


# Fields of others


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_would_change_the_answer_elsewhere_is_refused_by_name(server, name):
    for path, body in ((CHAT, plain("a")), (COMPLETIONS, {"prompt": "a"})):
        status, param, code, message = refused(server.post(path, body | {name: [1]}))
        assert (status, param, code) == (400, name, "invalid_value")
        assert message == f"{name}: not served; {REFUSED[name]}"


@pytest.mark.parametrize("name", MUST_BE_TRUE)
def test_a_switch_that_cannot_be_off_is_refused_when_it_is(server, name):
    assert refused(server.post(CHAT, plain("a") | {name: False}))[:2] == (400, name)
    assert server.post(CHAT, plain("a") | {name: True}).status_code == 200


def test_what_asks_for_nothing_and_what_no_answer_depends_on_passes(server):
    nothing = {name: value for name, value in zip(REFUSED, itertools.cycle((None, False, 0, "", [], {})))}
    harmless = dict.fromkeys(HARMLESS, "x") | {"metadata": {"a": "b"}, "store": True, "verbosity": "medium"}
    for more in (nothing, harmless, {"nobody": "knows"}):
        assert server.chat(plain("ab", max_tokens=9) | more)["choices"][0]["message"]["content"] == "ab"


def test_vllms_switches_for_the_end_of_a_prompt_say_what_is_done_anyway(server):
    resumed = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "max_tokens": 2}
    assert server.post(CHAT, plain("a", add_generation_prompt=True)).status_code == 200
    assert server.post(CHAT, resumed | {"continue_final_message": True}).status_code == 200
    assert refused(server.post(CHAT, plain("a", add_generation_prompt=False)))[:2] == (400, "add_generation_prompt")
    assert refused(server.post(CHAT, resumed | {"continue_final_message": False}))[:2] == (400, "messages")


# What cannot be done


@pytest.mark.parametrize("name", ["gpt-4o", "", "../../etc/passwd", "ech\u00f6", "a\nb", "x" * 100_000])
def test_an_unknown_model_is_404(server, name):
    for path, body in ((CHAT, plain("a")), (COMPLETIONS, {"prompt": "a"}), ("/tokenize", {"content": "a"})):
        status, param, code, message = refused(server.post(path, body | {"model": name}))
        assert (status, param, code) == (404, "model", "model_not_found")
        assert "'echo'" in message


def test_an_unknown_models_card_is_404(server):
    for path in ("/v1/models/gpt-4o", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/a%00b"):
        assert refused(server.get(path))[:3] == (404, "model", "model_not_found")


def test_a_prompt_fills_the_context_up_to_its_last_place_and_no_further(server):
    """512 tokens of context: 511 of prompt leave one for the reply; from 512 on both numbers are told."""
    for path in (CHAT, COMPLETIONS):
        for tokens in (511, 512, 513, 5000):
            body = {"prompt": [65] * tokens}
            if path == CHAT:
                empty = server.post("/tokenize", {"messages": said("")["messages"]}).json()["count"]
                body = said("x" * (tokens - empty))
            for stream in (False, True):
                response = server.post(path, body | {"stream": stream, "max_tokens": 4})
                if tokens == 511:
                    assert response.status_code == 200
                    continue
                status, param, code, message = refused(response)
                assert (status, code) == (400, "context_length_exceeded")
                assert path == COMPLETIONS or param == "messages"
                assert f" {tokens} tokens" in message and " 511 " in message


# Before any body is read


def chunks(count: int, size: int) -> AsyncIterator[bytes]:
    async def send() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * size

    return send()


def test_a_body_over_the_limit_is_413_told_by_its_length_or_by_its_bytes(server):
    told = server.request("POST", CHAT, content=b" " * (1024 * 1024 + 1), headers=JSON)
    counted = server.request("POST", CHAT, content=chunks(20, 64 * 1024), headers=JSON)
    assert "content-length" not in counted.request.headers
    for response in (told, counted):
        status, param, code, message = refused(response)
        assert (status, param, code) == (413, None, "body_too_large")
        assert "1 MB" in message and "--max-body" in message


def test_a_body_just_under_the_limit_is_read(server):
    body = json.dumps(plain("a")).encode()
    response = server.request("POST", CHAT, content=body + b" " * (1024 * 1024 - len(body)), headers=JSON)
    assert response.status_code == 200


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
def test_what_a_web_form_can_post_is_415(server, media):
    content = json.dumps(plain("a")).encode()
    response = server.request("POST", CHAT, content=content, headers={"content-type": media})
    status, *_, message = refused(response)
    assert (status, media in message) == (415, True)


PATHS = {
    "no such path": ("GET", "/v2/nothing", 404),
    "no such path, posted": ("POST", "/v1/chat", 404),
    "FastAPI's own pages": ("GET", "/docs", 404),
    "a method too many": ("GET", CHAT, 405),
    "deleting": ("DELETE", "/v1/models", 405),
    "a method nobody knows": ("BREW", "/health", 405),
}


@pytest.mark.parametrize(("method", "path", "expected"), PATHS.values(), ids=PATHS)
def test_paths_and_methods_that_are_not_there_say_so_in_openais_way(server, method, path, expected):
    response = server.request(method, path)
    assert refused(response)[0] == expected
    assert ("allow" in response.headers) is (expected == 405)


def test_an_end_of_thoughts_for_no_reply_is_404(server):
    status, _, code, _ = refused(server.post(f"{CHAT}/chatcmpl-nobody/end_thinking", {}))
    assert (status, code) == (404, "reply_not_found")


# The door

KEY = "sk-still-ünder-test"


@pytest.fixture(scope="module")
def closed():
    from stillhouse.server.settings import key_hash

    with fixtures.in_process(key_hashes=frozenset({key_hash(KEY), key_hash("another")})) as server:
        yield server


WRONG_KEYS = {
    "none": {},
    "another one": {"authorization": "Bearer sk-wrong"},
    "an empty one": {"authorization": "Bearer "},
    "the beginning of one": {"authorization": f"Bearer {KEY[:-1]}"},
    "another scheme": {"authorization": f"Basic {KEY}"},
    "in the other header, wrong": {"x-api-key": "sk-wrong"},
    "bytes that are no text": {"authorization": b"Bearer \xff\xfe"},
}


@pytest.mark.parametrize("headers", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_without_a_key_nothing_but_health_and_the_chat_page_is_answered(closed, headers):
    headers = {name: value if isinstance(value, bytes) else value.encode() for name, value in headers.items()}
    open_paths = ("/health", "/health/live", "/health/ready", "/ready", "/")
    paths = set(closed.service_paths()) - {*open_paths, "/page/x"}
    assert len(paths) >= 8
    for path in (*paths, "/nowhere", "/health/", "/health/../metrics"):
        for method in ("GET", "POST"):
            response = closed.request(method, path, headers=headers)
            status, param, code, _ = refused(response, kind="authentication_error")
            assert (status, param, code) == (401, None, "invalid_api_key"), path
            assert response.headers["www-authenticate"] == "Bearer"
    assert [closed.get(path, headers=headers).status_code for path in open_paths] == [200] * 5
    assert [closed.post(path, {}, headers=headers).status_code for path in ("/", "/page/x")] == [401] * 2


RIGHT_KEYS = {
    "OpenAI's header": {"authorization": f"Bearer {KEY}"},
    "in small letters, with spaces": {"authorization": f"bearer  {KEY} "},
    "the other header": {"x-api-key": KEY},
    "another of the keys": {"authorization": "Bearer another"},
}


@pytest.mark.parametrize("headers", RIGHT_KEYS.values(), ids=RIGHT_KEYS)
def test_every_key_of_the_file_opens(closed, headers):
    headers = {name: value.encode() for name, value in headers.items()}
    assert closed.get("/v1/models", headers=headers).status_code == 200


HOSTS = {
    "127.0.0.1:8000": 200,
    "localhost": 200,
    "LOCALHOST:80": 200,
    "[::1]:8000": 200,
    "evil.example": 403,
    "evil.example:8000": 403,
    "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "127.0.0.1@evil.example": 403,
    "evil.example/localhost": 403,
    "": 403,
}


@pytest.mark.parametrize(("host", "status"), HOSTS.items())
def test_another_name_for_this_machine_is_not_answered(server, host, status):
    """A web page can point its own name at 127.0.0.1 (DNS rebinding)."""
    response = server.get("/v1/models", headers={"host": host})
    assert response.status_code == status
    if status == 403:
        assert refused(response, kind="permission_error")[:3] == (403, None, "bad_host")


def test_a_server_for_the_network_answers_to_any_name():
    with fixtures.in_process(host="0.0.0.0") as server:
        assert server.get("/v1/models", headers={"host": "box.example"}).status_code == 200


ORIGINS = {
    "http://evil.example": 403,
    "null": 403,
    "http://127.0.0.1.evil.example": 403,
    "http://[": 403,
    "http://127.0.0.1:1": 403,  # another program's page on this machine
    "http://127.0.0.1": 200,  # our own
}


@pytest.mark.parametrize(("origin", "status"), ORIGINS.items())
def test_a_foreign_page_may_not_call(server, origin, status):
    for response in (
        server.post(CHAT, plain("a"), headers={"origin": origin}),
        server.get("/v1/models", headers={"origin": origin}),
    ):
        assert response.status_code == status
        if status == 403:
            assert refused(response, kind="permission_error")[:3] == (403, None, "bad_origin")
            assert "access-control-allow-origin" not in response.headers


# Anything at all

VALID = [
    (CHAT, said("script:a</think>b", max_tokens=20, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=1, n=2)),
    (CHAT, said("hello", max_tokens=12, logprobs=True, top_logprobs=2, stop=["x", "y"], logit_bias={"65": -1.5})),
    (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "s"}]},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "reasoning_content": "c"},
                {"role": "user", "content": "d"},
            ],
            "max_tokens": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "presence_penalty": 0.5,
            "repetition_penalty": 1.1,
            "dry_multiplier": 0.8,
            "xtc_probability": 0.5,
            "thinking_budget": 3,
            "reasoning_format": "both",
            "chat_template_kwargs": {"enable_thinking": True},
        },
    ),
    (COMPLETIONS, {"prompt": [65, 66], "max_tokens": 4, "logprobs": 1, "n": 2}),
    (COMPLETIONS, {"prompt": "ab", "max_tokens": 4, "echo": True, "stream": True, "stop": "b"}),
    ("/tokenize", {"content": "a</think>", "with_pieces": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
    ("/detokenize", {"tokens": [65, 256, 255]}),
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**31 - 1, 2**53, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "\x00", "\ud800", "</think>", "<｜Assistant｜>", "\ufdd0", "user", "assistant", "tool", "{{ x }}"]
    ),
    st.lists(st.one_of(st.none(), st.integers(-2, 300), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=6), st.one_of(st.integers(), st.text(max_size=3)), max_size=2),
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, its whole first."""
    if isinstance(node, dict):
        return [path, *(place for key, value in node.items() for place in places(value, (*path, key)))]
    if isinstance(node, list):
        return [path, *(place for i, value in enumerate(node) for place in places(value, (*path, i)))]
    return [path]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Any]:
    path, body = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        spots = [place for place in places(body) if place]
        if not spots:
            break
        *parents, last = draw(st.sampled_from(spots))
        node: Any = body
        for step in parents:
            node = node[step]
        match draw(st.sampled_from(["replace", "replace", "remove", "repeat", "add"])):
            case "replace":
                node[last] = draw(ODD)
            case "remove":
                del node[last]
            case "repeat" if isinstance(node, list):
                node.extend([node[last]] * draw(st.integers(1, 30)))
            case _ if isinstance(node, dict):
                node[draw(st.text(max_size=5))] = draw(ODD)
    return path, body


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutated())
@example((CHAT, said("", max_tokens=1) | {"messages": [{"role": "assistant", "content": None}]}))
@example((CHAT, said("a", max_tokens=3) | {"chat_template_kwargs": {"messages": "x", "add_generation_prompt": 1}}))
@example((CHAT, said("a", max_tokens=3) | {"chat_template_kwargs": {"bos_token": None, "self": 1}}))
@example((CHAT, said("a", max_tokens=3, seed=2**64 - 1, n=3)))
@example((CHAT, said("a", max_tokens=3) | {"logit_bias": {str(i): -100 for i in range(262)}}))
@example((CHAT, said("a", max_tokens=3, temperature=1e-300, top_p=1e-300, repetition_penalty=1e-300)))
@example((CHAT, said("a", max_tokens=3, dry_multiplier=100, dry_base=100, dry_allowed_length=0)))
def test_no_body_is_our_mistake(server, case):
    path, body = case
    response = server.request("POST", path, content=json.dumps(body).encode(), headers=JSON)
    assert response.status_code < 500, (path, body, response.text)
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].isprintable() and len(error["message"]) <= 400, error["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert [event for event in fixtures.events(response.text) if "error" in event] == []


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_byte_is_our_mistake(server, case, changes):
    path, body = case
    data = bytearray(json.dumps(body).encode())
    for at, byte in changes:
        data[at % len(data)] = byte
    response = server.request("POST", path, content=bytes(data), headers=JSON)
    assert response.status_code < 500, (path, bytes(data), response.text)
