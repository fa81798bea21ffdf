"""What upstreams promise: a server behind ours answers as if it were ours, and one that fails is told by name.

The upstreams are `stillhouse serve echo` in processes of their own, some of which call themselves vLLM, and a server
that says byte for byte what a test wants.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fixtures, other = _beside("server_fixtures"), _beside("upstream_server")
said, plain, within, Process = fixtures.said, fixtures.plain, fixtures.within, fixtures.Process
UpstreamServer, as_events, as_json, delta = other.UpstreamServer, other.as_events, other.as_json, other.delta

CHAT = "/v1/chat/completions"
# An echo that speaks vLLM's protocol, thoughts told apart and all: nothing in it says Stillhouse.
DISGUISED = """
from stillhouse.server import tokens
plain = tokens.model_json
tokens.model_json = lambda model: plain(model) | {"owned_by": "vllm"}
"""


@contextlib.contextmanager
def front(*upstreams: str, flags: tuple[str, ...] = (), **options: Any) -> Iterator[Any]:
    """Our server in front of these URLs."""
    named = [word for url in upstreams for word in ("--upstream", url)]
    with Process("--backend", "openai", *named, *flags, **{"model": "echo"} | options) as server:
        yield server
        assert "Traceback" not in server.stderr, server.stderr


def ask(server: Any, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{CHAT}", json=body, timeout=20)


def streamed(server: Any, body: dict[str, Any]) -> list[Any]:
    with httpx.stream("POST", f"{server.url}{CHAT}", json=body | {"stream": True}, timeout=20) as response:
        assert response.status_code == 200, response.read()
        return fixtures.events("".join(response.iter_text()))


def metric(server: Any, name: str) -> dict[str, float]:
    """A metric by its last label."""
    found = {}
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"{name}{{"):
            labels, _, value = line.rpartition(" ")
            found[labels.rpartition('="')[2].removesuffix('"}')] = float(value)
    return found


@pytest.fixture(scope="module")
def ours() -> Iterator[Any]:
    with Process("--parallel", "16") as server:
        yield server


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    with Process("--parallel", "16", more=DISGUISED) as server:
        yield server


@pytest.fixture(scope="module")
def front_of_ours(ours: Any) -> Iterator[Any]:
    with front(ours.url, flags=("--parallel", "16")) as server:
        yield server


@pytest.fixture(scope="module")
def front_of_theirs(theirs: Any) -> Iterator[Any]:
    with front(f"{theirs.url}/v1/", flags=("--parallel", "16")) as server:
        yield server


# The same reply


SAME = {
    "a question": said("Hello there"),
    "no thoughts": plain("four"),
    "thoughts and an answer": said("script:hm\n\nwell</think>\n\nfour <b>&</b> ž 👩‍👩‍👧"),
    "a stop string in the answer": said("script:a.b</think>\n\none. two", stop="."),
    "a stop string in the thoughts too": said("script:a.b</think>\n\none", stop=".", stop_scope="all"),
    "a stop string that never comes": said("script:a</think>\n\nb STO", stop=["STOP"]),
    "three replies": said("Hi", n=3),
    "cut short in its answer": said("script:a</think>\n\n" + "b" * 50, max_tokens=20),
    "thoughts hidden": said("Hi", reasoning_format="hidden"),
    "thoughts in both fields": said("Hi", reasoning_format="both"),
    "a conversation": {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hi!", "reasoning_content": "hm"},
            {"role": "user", "content": "Bye"},
        ]
    },
}


def told(reply: dict[str, Any]) -> list[Any]:
    return [(c["message"], c["finish_reason"], c["reasoning_closed_by"]) for c in reply["choices"]]


@pytest.mark.parametrize("body", SAME.values(), ids=SAME)
def test_a_reply_is_the_same_as_without_us_between(ours, front_of_ours, front_of_theirs, body):
    direct = ask(ours, body).json()
    for server in (front_of_ours, front_of_theirs):
        reply = ask(server, body).json()
        assert told(reply) == told(direct), server
        assert reply["usage"]["prompt_tokens"] == direct["usage"]["prompt_tokens"]


@pytest.mark.parametrize("body", SAME.values(), ids=SAME)
def test_a_stream_joined_is_the_whole_reply(front_of_theirs, body):
    whole = ask(front_of_theirs, body).json()
    joined = [{"role": "assistant"} for _ in whole["choices"]]
    for event in streamed(front_of_theirs, body):
        for choice in event["choices"]:
            for key, text in choice["delta"].items():
                if key != "role" and text:
                    joined[choice["index"]][key] = joined[choice["index"]].get(key, "") + text
    messages = [{key: text for key, text in c["message"].items() if text} for c in whole["choices"]]
    assert joined == messages


def test_thoughts_inline_have_both_of_their_tags(front_of_theirs):
    (choice,) = ask(front_of_theirs, said("Hi", reasoning_format="inline")).json()["choices"]
    assert choice["message"]["content"] == "<think>I am to say this again.</think>\n\nHi"


def test_a_text_goes_on_as_it_does_upstream(ours, front_of_ours, front_of_theirs):
    for body in ({"prompt": "abc"}, {"prompt": [97, 98]}, {"prompt": "a.b", "stop": ".", "echo": True}):
        servers = (ours, front_of_ours, front_of_theirs)
        replies = [httpx.post(f"{server.url}/v1/completions", json=body).json() for server in servers]
        texts = [(reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]) for reply in replies]
        assert texts[1:] == texts[:1] * 2


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_tools_are_called_as_upstream_calls_them(ours, front_of_ours, front_of_theirs):
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    body = said(f"script:hm</think>\n\n{call}", tools=[TOOL], tool_choice="required")
    direct = ask(ours, body).json()["choices"][0]
    assert direct["finish_reason"] == "tool_calls"
    for server in (front_of_ours, front_of_theirs):
        choice = ask(server, body).json()["choices"][0]
        calls = [call["function"] for call in choice["message"]["tool_calls"]]
        assert (calls, choice["finish_reason"]) == (
            [call["function"] for call in direct["message"]["tool_calls"]],
            "tool_calls",
        )
        names = [
            call["function"].get("name")
            for event in streamed(server, body)
            for choice in event["choices"]
            for call in choice["delta"].get("tool_calls", ())
        ]
        assert names[0] == "add" and set(names[1:]) <= {None}


def test_another_stillhouse_keeps_every_rule_itself(front_of_ours):
    budget = ask(front_of_ours, said("script:" + "a " * 40 + "</think>b", thinking_budget=8)).json()["choices"][0]
    form = ask(front_of_ours, said("script:hm</think>\n\n7", regex="[0-9]", min_thinking_tokens=2)).json()["choices"][0]
    assert budget["reasoning_closed_by"] == "budget"
    assert (form["message"]["content"], form["reasoning_closed_by"]) == ("7", "model")


# Thoughts that we close


def test_thoughts_are_cut_at_their_budget_and_the_answer_is_asked_for_anew(front_of_theirs):
    reply = ask(front_of_theirs, said("Hello", thinking_budget=9)).json()
    (choice,) = reply["choices"]
    thoughts = choice["message"]["reasoning_content"]
    assert thoughts.startswith("I am to s") and thoughts.endswith("it is time to give the final answer.")
    assert (choice["message"]["content"], choice["reasoning_closed_by"], choice["finish_reason"]) == (
        "Hello",
        "budget",
        "stop",
    )
    assert reply["thinking_limit"] == {"tokens": 9, "by": "budget", "clamped": False}


def test_a_budget_of_nothing_gives_an_answer_only(front_of_theirs):
    (choice,) = ask(front_of_theirs, said("Hello", thinking_budget=0)).json()["choices"]
    assert (choice["message"], choice["reasoning_closed_by"]) == ({"role": "assistant", "content": "Hello"}, None)


def test_thoughts_leave_room_for_the_answer(front_of_theirs):
    body = said("script:" + "think " * 60, max_tokens=100)
    (choice,) = ask(front_of_theirs, body).json()["choices"]
    assert choice["reasoning_closed_by"] == "reserve" and choice["message"]["content"]


def test_thoughts_that_go_in_circles_are_broken(front_of_theirs):
    body = said("script:" + "round and round it goes. " * 30 + "</think>out")
    (choice,) = ask(front_of_theirs, body).json()["choices"]
    assert choice["reasoning_closed_by"] == "loop"


def test_thoughts_can_be_ended_while_they_come():
    with Process(step_s=0.01, more=DISGUISED) as upstream, front(upstream.url) as server:
        body = said("script:" + "and so on. Or not? " * 30, stream=True, break_loops=False)
        with httpx.stream("POST", f"{server.url}{CHAT}", json=body, timeout=20) as response:
            ended, by = False, None
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if not ended:
                        answer = httpx.post(f"{server.url}{CHAT}/{event['id']}/end_thinking")
                        ended = answer.status_code == 200
                    by = by or event["choices"][0].get("reasoning_closed_by")
        assert (ended, by) == (True, "user")


def parsed_nothing(path: str, body: dict[str, Any]) -> Any:
    """A vLLM without a reasoning parser: the template opens the thoughts, and the text begins in them."""
    if path == "/tokenize":
        return as_json({"tokens": [1, 2, 3], "count": 3, "max_model_len": 1000})
    if path == "/detokenize":
        return as_json({"prompt": "<｜Assistant｜><think>\n"})
    pieces = [delta(content=text) for text in ("I ", "think.</th", "ink>\n", "\nfour")]
    return as_events(delta(role="assistant", content=""), *pieces, delta("stop"), other.usage(5, 9))


def test_thoughts_that_an_upstream_leaves_in_the_text_are_told_apart():
    with UpstreamServer(parsed_nothing) as upstream, front(upstream.url, model="theirs") as server:
        reply = ask(server, said("Hi", model="theirs")).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "four", "reasoning_content": "I think."}
    assert reply["usage"]["prompt_tokens"] == 5 and reply["usage"]["completion_tokens"] == 9


def mlx_like(path: str, body: dict[str, Any]) -> Any:
    """mlx_lm.server: thoughts in `reasoning`, and no way to have a prompt written down."""
    if path != CHAT:
        return as_json({"error": "Not Found"}, 404)
    return as_events(delta(role="assistant", reasoning="hm"), delta(content="four"), delta("stop"), other.usage(5, 9))


REFUSED = {  # what nobody can promise for a server that can't go on with a reply
    "thinking_budget": 5,
    "answer_reserve_tokens": 5,
    "break_loops": True,
    "empty_answer": "close",
    "min_thinking_tokens": 5,
    "penalty_scope": "answer",
    "preserve_thinking": True,
    "logprobs": True,
    "regex": "a",
    "choice": ["a"],
    "grammar": 'start: "a"',
    "guided_json": {"type": "object"},
}


@pytest.fixture(scope="module")
def front_of_mlx() -> Iterator[Any]:
    with UpstreamServer(mlx_like) as upstream, front(upstream.url, model="theirs") as server:
        server.upstream = upstream
        yield server


@pytest.mark.parametrize(("field", "value"), REFUSED.items(), ids=REFUSED)
def test_what_an_upstream_can_not_promise_is_refused_by_name(front_of_mlx, field, value):
    response = ask(front_of_mlx, said("Hi", model="theirs", **{field: value}))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(f"{field}: can't be promised through ")


def test_what_is_left_unsaid_is_not_refused(front_of_mlx):
    reply = ask(front_of_mlx, said("Hi", model="theirs", seed=3, n=2, temperature=0, top_k=5)).json()
    message = {"role": "assistant", "content": "four", "reasoning_content": "hm"}
    assert [choice["message"] for choice in reply["choices"]] == [message] * 2
    asked = front_of_mlx.upstream.bodies()[-2:]
    said_each = sorted((body["model"], body["seed"], body["temperature"], body["top_k"]) for body in asked)
    assert said_each == [("theirs", 3, 0, 5), ("theirs", 4, 0, 5)]  # sorted: the two are asked at once
    assert "thinking_limit" not in reply


def test_tokens_are_the_upstreams_own(front_of_mlx):
    response = httpx.post(f"{front_of_mlx.url}/tokenize", json={"content": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "no_tokens")


# Which upstream


def conversation(turns: int, name: str, system: str = "Be short.") -> dict[str, Any]:
    messages: list[dict[str, str]] = [{"role": "system", "content": system}]
    for turn in range(turns):
        messages += [{"role": "user", "content": f"{name} {turn}"}, {"role": "assistant", "content": "Yes."}]
    return {"messages": messages[:-1], "chat_template_kwargs": {"enable_thinking": False}}


def spread(server: Any) -> list[float]:
    return sorted(metric(server, "r1_upstream_requests_total").values())


def test_requests_go_to_the_upstream_that_is_least_busy():
    with Process(step_s=0.02) as one, Process(step_s=0.02) as two, front(one.url, two.url) as server:
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda i: ask(server, plain(f"{i} " * 10)), range(8)))
        assert [reply.status_code for reply in replies] == [200] * 8
        assert spread(server) == [4, 4]


def test_a_conversation_goes_where_its_beginning_was_read():
    with Process() as one, Process() as two, front(one.url, two.url) as server:
        ask(server, conversation(1, "first"))
        for other_one in range(3):  # they come between, and share nothing but the system message
            ask(server, plain(f"{other_one}"))
        before = metric(server, "r1_upstream_requests_total")
        for turns in (2, 3, 4, 5):
            ask(server, conversation(turns, "first"))
        after = metric(server, "r1_upstream_requests_total")
        assert sorted(after[name] - before[name] for name in before) == [0, 4]


def test_a_beginning_is_not_worth_the_wait_behind_a_crowd():
    """One upstream has read it, and is 5 replies busier than the other."""
    with (
        Process("--parallel", "16", step_s=0.05) as one,
        Process("--parallel", "16", step_s=0.05) as two,
        front(one.url, two.url, flags=("--parallel", "16")) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        long = "Be short. " * 120
        ask(server, conversation(1, "x", long))
        replies = list(pool.map(lambda _: ask(server, conversation(2, "x", long)), range(8)))
        assert [reply.status_code for reply in replies] == [200] * 8
        # The first and 5 of the crowd where it was read; then the other, which is read there too by now.
        assert spread(server)[0] >= 2


def test_more_than_there_are_places_for_wait_and_then_are_refused():
    with (
        Process(step_s=0.02) as upstream,
        front(upstream.url, flags=("--parallel", "1", "--max-waiting", "1")) as server,
        ThreadPoolExecutor(3) as pool,
    ):
        replies = list(pool.map(lambda _: ask(server, plain("word " * 8)), range(3)))
    assert sorted(reply.status_code for reply in replies) == [200, 200, 429]


def test_a_client_that_hangs_up_frees_its_place_upstream_too():
    with Process(step_s=0.02) as upstream, front(upstream.url) as server:
        with httpx.stream("POST", f"{server.url}{CHAT}", json=plain("word " * 200, stream=True)) as response:
            pieces = response.iter_bytes()
            next(pieces)
            assert within(5, lambda: upstream.running() == 1)
        assert within(1, lambda: server.running() == 0 and upstream.running() == 0)


# What goes wrong


def refused_at_the_start(*flags: str, model: str = "echo", environment: dict[str, str] | None = None) -> list[str]:
    """What `serve` says before it ends with 2."""
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse", "serve", *([model] if model else []), "--port", "0", *flags],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        env=os.environ | (environment or {}),
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("asking ")]
    assert (done.returncode, lines[0][:7], "Traceback" in done.stderr) == (2, "error: ", False), done.stderr
    assert len(lines) <= 2 and all(line.startswith("hint: ") for line in lines[1:])
    return lines


def openai(url: str) -> tuple[str, ...]:
    return "--backend", "openai", "--upstream", url


def test_flags_that_contradict_are_told(ours):
    cases = {
        "--backend openai needs a server": ("--backend", "openai"),
        "--upstream is for models that others serve": ("--upstream", ours.url),
        "--upstream 'localhost:1' is no URL": openai("localhost:1"),
        "--upstream 'http://a:b' is no URL": openai("http://a:b"),
        "a URL with a name": openai("http://user:secret@localhost:1"),
        "--lora says how a model is loaded": (*openai(ours.url), "--lora", "x.gguf"),
        "an upstream is named twice": (*openai(ours.url), "--upstream", f"{ours.url}/v1"),
    }
    for words, flags in cases.items():
        line = refused_at_the_start(*flags)[0]
        assert words in line and "secret" not in line, line


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_an_upstream_that_is_down_is_told_before_serving():
    port = free_port()
    assert (
        f"the upstream 127.0.0.1:{port} cannot be reached"
        in refused_at_the_start(*openai(f"http://127.0.0.1:{port}"))[0]
    )


NONSENSE = {
    "a web page": (
        (200, "text/html", [b"<html>"]),
        "is no OpenAI-compatible server: /v1/models answered 200 with text/html",
    ),
    "nothing there": ((404, "text/plain", [b"not found"]), "is no OpenAI-compatible server: /v1/models answered 404"),
    "other JSON": (as_json({"data": [{"name": "x"}]}), "is no OpenAI-compatible server"),
    "a key wanted": (as_json({"error": {"message": "no"}}, 401), "wants a key (401)"),
    "still loading": (as_json({}, 503), "is not ready yet (503)"),
    "several models": (as_json({"data": [{"id": "a"}, {"id": "b"}]}), "serves 2 models: a, b"),
}


@pytest.mark.parametrize(("models", "words"), NONSENSE.values(), ids=NONSENSE)
def test_an_upstream_that_can_not_be_used_is_told_before_serving(models, words):
    with UpstreamServer(mlx_like, models) as upstream:
        assert words in refused_at_the_start(*openai(upstream.url), model="")[0]


def test_a_wrong_key_and_a_model_that_is_not_there_are_told_before_serving(tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("sk-right\n")
    with Process("--api-key-file", str(keys)) as upstream:
        wrong = refused_at_the_start(*openai(upstream.url), environment={"STILLHOUSE_UPSTREAM_KEY": "sk-wrong"})
        assert "does not take our key (401)" in wrong[0] and "STILLHOUSE_UPSTREAM_KEY" in wrong[1]
        assert "sk-wrong" not in "".join(wrong)
        flags = ("--upstream-key-file", str(keys))
        assert (
            "does not serve 'gpt-4'; it serves echo"
            in refused_at_the_start(*openai(upstream.url), *flags, model="gpt-4")[0]
        )
        with front(upstream.url, flags=flags) as server:
            assert ask(server, plain("a")).json()["choices"][0]["message"]["content"] == "a"


def test_an_upstream_that_speaks_nonsense_is_told_before_serving():
    with UpstreamServer(lambda path, body: as_json({"choices": []})) as upstream:
        line = refused_at_the_start(*openai(upstream.url), model="theirs")[0]
    assert "speaks nonsense: it answered with application/json where a stream was asked for" in line


def late(first: Any) -> Any:
    """Speaks sense while it is looked at, and then what a test wants."""
    seen: list[int] = []

    def script(path: str, body: dict[str, Any]) -> Any:
        if path == CHAT and body.get("max_tokens") != 8:
            seen.append(1)
            return first(body)
        return mlx_like(path, body)

    return script


BREAKS = {  # what comes -> status (or 200: it had begun), words
    "no end": (as_events(delta(content="fo"), done=False), 200, "broke off in mid-reply"),
    "no end but [DONE]": (as_events(delta(content="fo")), 200, "broke off in mid-reply"),
    "an error event": (as_events(delta(content="fo"), {"error": {"message": "out of memory"}}), 200, "out of memory"),
    "no JSON": (as_events(delta(content="fo"), "{nonsense"), 200, "no JSON"),
    "a list": (as_events(delta(content="fo"), "[]"), 200, "no object"),
    "500": (as_json({"error": {"message": "oops"}}, 500), 502, "oops (500)"),
    "503": (as_json({"error": {"message": "busy"}}, 503), 503, "busy"),
    "429": (as_json({"error": {"message": "slow down"}}, 429), 429, "slow down"),
    "400": (as_json({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400), 400, "too long"),
    "401 all of a sudden": (as_json({}, 401), 502, "does not take our key"),
    "a web page": ((200, "text/html", [b"<html>"]), 502, "text/html where a stream was asked for"),
}


@pytest.mark.parametrize(("answer", "status", "words"), BREAKS.values(), ids=BREAKS)
def test_a_reply_that_breaks_off_is_told_as_such(answer, status, words):
    """In a stream an error event is the last one, and there is no [DONE]; a whole reply is an error."""
    with UpstreamServer(late(lambda body: answer)) as upstream, front(upstream.url, model="theirs") as server:
        whole = ask(server, said("Hi", model="theirs"))
        assert (whole.status_code, words in whole.json()["error"]["message"]) == (
            502 if status == 200 else status,
            True,
        )
        within(5, lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        stream = ask(server, said("Hi", model="theirs", stream=True))
        last = json.loads(stream.text.rstrip().rpartition("data: ")[2])
        assert words in last["error"]["message"] and "[DONE]" not in stream.text
        assert ('"content": "fo"' in stream.text) == (status == 200)


def test_an_upstream_that_dies_in_mid_stream_ends_it_with_an_error_event():
    with Process(step_s=0.02) as upstream, front(upstream.url) as server:
        with httpx.stream(
            "POST", f"{server.url}{CHAT}", json=plain("word " * 100, stream=True), timeout=20
        ) as response:
            lines = response.iter_lines()
            assert any('"content": "w"' in line for line in lines)
            upstream.popen.kill()
            rest = list(lines)
        error = json.loads([line for line in rest if line][-1].removeprefix("data: "))["error"]
        assert (error["code"], "hung up" in error["message"]) == ("upstream_failed", True), error
        assert not any("[DONE]" in line for line in rest)
        assert within(5, lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        refused = ask(server, plain("a"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "upstream_failed")


def test_an_upstream_that_says_nothing_is_given_up():
    def nothing(body: dict[str, Any]) -> Any:
        return 200, "text/event-stream", (time.sleep(2) or b"" for _ in range(1))

    flags = ("--upstream-timeout", "0.3")
    with UpstreamServer(late(nothing)) as upstream, front(upstream.url, model="theirs", flags=flags) as server:
        response = ask(server, said("Hi", model="theirs"))
    assert (response.status_code, "says nothing" in response.json()["error"]["message"]) == (504, True)


def test_of_two_upstreams_one_may_die_and_come_back():
    port = free_port()
    with Process() as one, contextlib.ExitStack() as stack:
        two = stack.enter_context(Process("--port", str(port)))
        server = stack.enter_context(front(one.url, two.url))
        two.end()
        replies = [ask(server, plain(f"{i}")) for i in range(6)]
        assert [reply.status_code for reply in replies] == [200] * 6
        assert within(5, lambda: metric(server, "r1_upstream_up")[f"127.0.0.1:{port}"] == 0)
        assert httpx.get(f"{server.url}/ready").status_code == 200
        stack.enter_context(Process("--port", str(port)))
        assert within(15, lambda: metric(server, "r1_upstream_up")[f"127.0.0.1:{port}"] == 1)


def test_one_upstream_of_two_is_enough_to_start(ours):
    port = free_port()
    with front(ours.url, f"http://127.0.0.1:{port}") as server:
        assert f"warning: the upstream 127.0.0.1:{port} cannot be reached" in server.stderr
        assert ask(server, plain("a")).status_code == 200


def test_told_to_stop_it_finishes_what_runs_and_a_second_signal_cuts_it():
    with Process(step_s=0.02) as upstream, front(upstream.url) as server:
        received: list[str] = []

        def read() -> None:
            with httpx.stream(
                "POST", f"{server.url}{CHAT}", json=plain("w " * 400, stream=True), timeout=30
            ) as response:
                received.extend(response.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        assert within(5, lambda: server.running() == 1)
        server.told_to_stop()
        assert within(2, lambda: ask(server, plain("a")).status_code == 503)
        server.told_to_stop()
        assert server.exit_code(6) == 0
        reader.join(5)
    last = json.loads([line for line in received if line][-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_failed"


def test_keys_and_names_are_ours_and_not_the_upstreams(tmp_path, ours):
    keys = tmp_path / "keys.txt"
    keys.write_text("sk-front\n")
    with front(ours.url, flags=("--api-key-file", str(keys), "--alias", "house")) as server:
        assert ask(server, plain("a")).status_code == 401
        headers = {"authorization": "Bearer sk-front"}
        reply = httpx.post(f"{server.url}{CHAT}", json=plain("a") | {"model": "house"}, headers=headers).json()
        listed = httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"]
    assert (reply["model"], [entry["id"] for entry in listed]) == ("house", ["house"])


def test_our_key_is_not_told_and_the_callers_key_is_not_passed_on():
    with UpstreamServer(mlx_like) as upstream:
        with front(upstream.url, model="theirs") as server:
            headers = {"authorization": "Bearer sk-of-the-caller"}
            httpx.post(f"{server.url}{CHAT}", json=said("Hi", model="theirs"), headers=headers)
        assert {key for _, _, key in upstream.heard} == {""}


# Another program


@contextlib.contextmanager
def llama_server(model: Path, *flags: str) -> Iterator[str]:
    """llama.cpp's own server, where there is one."""
    program = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if program is None:
        pytest.skip("there is no llama-server: set LLAMA_SERVER, or put it on the PATH")
    port = free_port()
    command = [program, "-m", str(model), "--port", str(port), "-c", "2048", "-t", "1", "--alias", "theirs", *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        url = f"http://127.0.0.1:{port}"

        def is_up() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/health").status_code == 200
            return False

        try:
            assert within(60, is_up)
            yield url
        finally:
            running.kill()


@pytest.mark.slow
def test_a_real_llama_server_is_an_upstream(smollm2_path):
    with llama_server(smollm2_path) as url, front(url, model="theirs") as server:
        body = said("Say hello.", model="theirs", max_tokens=12, temperature=0)
        direct = httpx.post(f"{url}{CHAT}", json=body, timeout=60).json()
        reply = ask(server, body).json()
        assert reply["choices"][0]["message"]["content"] == direct["choices"][0]["message"]["content"]
        for count in ("prompt_tokens", "completion_tokens"):
            assert reply["usage"][count] == direct["usage"][count]
        stopped = ask(server, body | {"stop": direct["choices"][0]["message"]["content"][3:6]}).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["usage"]["prompt_tokens"] == direct["usage"]["prompt_tokens"]
        assert ask(server, said("x " * 9000, model="theirs")).status_code == 400


@pytest.mark.slow
def test_a_real_llama_servers_thoughts_are_closed_and_its_answer_follows(random_path, tmp_path):
    """A model of random weights, whose template opens the thoughts: it would never close them by itself."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}<think>\n")
    flags = ("--jinja", "--chat-template-file", str(template))
    for told in ("none", "deepseek"):
        with (
            llama_server(random_path, *flags, "--reasoning-format", told) as url,
            front(url, model="theirs") as server,
        ):
            body = said("Hi", model="theirs", thinking_budget=8, max_tokens=60, temperature=0)
            (choice,) = ask(server, body).json()["choices"]
            assert (choice["reasoning_closed_by"], choice["finish_reason"]) == ("budget", "length")
            assert choice["message"]["content"] and choice["message"]["reasoning_content"]
            (none,) = ask(server, body | {"thinking_budget": 0}).json()["choices"]
            assert none["message"]["content"] and "reasoning_content" not in none["message"]
