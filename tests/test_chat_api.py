"""What the paths promise to a client that asks well: whole or streamed, the same reply, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx
import pytest
import server_fixtures as fixtures
from prometheus_client.parser import text_string_to_metric_families

said, plain = fixtures.said, fixtures.plain

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server():
    with fixtures.in_process() as server:
        yield server


def gathered(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a client puts together from the chunks of a stream, by choice."""
    replies: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            reply = replies.setdefault(choice["index"], {"content": "", "reasoning_content": "", "finish_reason": None})
            for field in ("content", "reasoning_content"):
                reply[field] += choice["delta"].get(field) or ""
            reply["finish_reason"] = choice["finish_reason"] or reply["finish_reason"]
    return replies


def whole(reply: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The same of a reply in one object."""
    return {
        choice["index"]: {
            "content": choice["message"]["content"] or "",
            "reasoning_content": choice["message"].get("reasoning_content", ""),
            "finish_reason": choice["finish_reason"],
        }
        for choice in reply["choices"]
    }


def only(reply: dict[str, Any]) -> dict[str, Any]:
    (choice,) = whole(reply).values()
    return choice


# Chat

REPLIES = {
    "thoughts and an answer": (said("script:2+2\n</think>\n\n4"), "2+2", "4", "stop"),
    "an answer only": (plain("four"), "", "four", "stop"),
    "thoughts that never end": (said("script:hm, well", empty_answer="allow"), "hm, well", "", "stop"),
    "nothing at all": (plain(""), "", "", "stop"),
    "white space": (plain("  a\n\nb \n"), "", "  a\n\nb \n", "stop"),
    "letters of several bytes": (said("script:žluť</think>\n\n你好 👨‍👩‍👧 é"), "žluť", "你好 👨‍👩‍👧 é", "stop"),
    "a tag that is only half there": (
        said("script:a </thin b</think>c </think> d"),
        "a </thin b",
        "c </think> d",
        "stop",
    ),
    "characters that JSON and SSE escape": (
        plain('"\\\r\n\u2028data: [DONE]'),
        "",
        '"\\\r\n\u2028data: [DONE]',
        "stop",
    ),
    "cut by max_tokens": (plain("abcdef", max_tokens=3), "", "abc", "length"),
    "cut by max_completion_tokens": (plain("abcdef", max_completion_tokens=3), "", "abc", "length"),
    "the newer name goes first": (plain("abcdef", max_tokens=5, max_completion_tokens=2), "", "ab", "length"),
    "cut inside a letter": (plain("aé", max_tokens=2), "", "a\ufffd", "length"),
    "a stop string": (plain("one two three", stop=" t"), "", "one", "stop"),
    "the first of two stop strings": (plain("one two three", stop=["three", "two"]), "", "one ", "stop"),
    "a stop string in the thoughts is none": (
        said("script:a STOP b</think>c STOP d", stop="STOP"),
        "a STOP b",
        "c ",
        "stop",
    ),
    "half a stop string at the end": (plain("it is EN", stop="END"), "", "it is EN", "stop"),
}


@pytest.mark.parametrize(("body", "reasoning", "answer", "finish"), REPLIES.values(), ids=REPLIES)
def test_whole_and_streamed_replies_are_the_same_text(server, body, reasoning, answer, finish):
    expected = {0: {"content": answer, "reasoning_content": reasoning, "finish_reason": finish}}
    assert whole(server.chat(body)) == expected
    assert gathered(server.stream(body)) == expected


def test_the_echo_says_what_was_asked(server):
    assert only(server.chat(said("Hello"))) == {
        "content": "Hello",
        "reasoning_content": "I am to say this again.",
        "finish_reason": "stop",
    }


def test_a_whole_reply_has_openais_shape(server):
    reply = server.chat(said("script:ab</think>c"))
    message = {"role": "assistant", "content": "c", "reasoning_content": "ab"}
    assert reply.items() >= {"object": "chat.completion", "model": "echo"}.items()
    assert reply["id"].startswith("chatcmpl-") and isinstance(reply["created"], int)
    (choice,) = reply["choices"]
    assert choice.items() >= {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}.items()


def test_thoughts_without_an_answer_leave_the_content_null_and_no_thoughts_leave_no_field(server):
    messages = [
        server.chat(body)["choices"][0]["message"]
        for body in (said("script:hm", empty_answer="allow"), plain("a"), plain(""))
    ]
    assert messages == [
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": ""},
    ]


def test_the_role_comes_first_and_every_chunk_is_of_one_reply(server):
    chunks = server.stream(said("script:a</think>b"))
    assert chunks[0]["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    assert [c for c in chunks[1:] for choice in c["choices"] if "role" in choice["delta"]] == []
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", chunks[0]["created"], "echo")
    }


def test_only_the_last_chunk_tells_the_reason_to_end(server):
    chunks = server.stream(said("script:a</think>b"))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_thoughts_and_answer_never_share_a_delta_nor_change_places(server):
    deltas = [choice["delta"] for chunk in server.stream(said("script:ab</think>cd")) for choice in chunk["choices"]]
    told = [field for delta in deltas for field, text in delta.items() if text and field != "role"]
    assert [field for field, _ in itertools.groupby(told)] == ["reasoning_content", "content"]
    assert max(len(delta.keys() - {"role"}) for delta in deltas) == 1


def test_usage_comes_last_with_no_choices_and_only_when_asked_for(server):
    body = said("script:ab</think>c")
    asked = server.stream(body | {"stream_options": {"include_usage": True}})
    assert (asked[-1]["choices"], [chunk["usage"] for chunk in asked[:-1]]) == ([], [None] * (len(asked) - 1))
    assert asked[-1]["usage"] == server.chat(body)["usage"]
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        assert [chunk for chunk in server.stream(body | options) if "usage" in chunk or not chunk["choices"]] == []


USAGE = {  # reply -> (completion tokens, of these thoughts): a byte is a token, and so is a tag and the end
    "thoughts and an answer": (said("script:ab</think>cde"), 7, 3),
    "no thoughts": (plain("cde"), 4, 0),
    "thoughts only": (said("script:ab", empty_answer="allow"), 3, 3),
    "cut": (plain("abcdef", max_tokens=4), 4, 0),
    "twice": (plain("ab", n=2), 6, 0),
}


@pytest.mark.parametrize(("body", "completion", "reasoning"), USAGE.values(), ids=USAGE)
def test_usage_counts_tokens(server, body, completion, reasoning):
    kwargs = body.get("chat_template_kwargs", {})
    prompt = server.post("/tokenize", {"messages": body["messages"]}).json()["count"]
    prompt += (
        len("\n</think>\n\n") - len("</think>") + 1 if kwargs else 0
    )  # `<think>\n` becomes `<think>\n\n</think>\n\n`
    usage = server.chat(body)["usage"]
    details = usage["prompt_tokens_details"], usage["completion_tokens_details"]
    assert {name: usage[name] for name in usage if not name.endswith("_details")} == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    assert details == ({"cached_tokens": 0}, {"reasoning_tokens": reasoning})


def test_every_one_of_n_replies_is_a_choice(server):
    body = said("script:a</think>b", n=3)
    expected = {i: {"content": "b", "reasoning_content": "a", "finish_reason": "stop"} for i in range(3)}
    assert whole(server.chat(body)) == expected
    chunks = server.stream(body)
    assert gathered(chunks) == expected
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:4]] == ["assistant"] * 3 + [None]


def texts_of(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["token"] for entry in entries]


def test_logprobs_of_the_answer_are_content_and_those_of_the_thoughts_are_apart(server):
    (choice,) = server.chat(said("script:ab</think>cd", logprobs=True, top_logprobs=2))["choices"]
    logprobs = choice["logprobs"]
    assert (texts_of(logprobs["content"]), texts_of(logprobs["reasoning"])) == (
        ["c", "d", "<|end|>"],
        ["a", "b", "</think>"],
    )
    for entry in logprobs["content"] + logprobs["reasoning"]:
        best, second = entry.pop("top_logprobs")
        assert entry == best
        assert entry == {
            "token": entry["token"],
            "logprob": pytest.approx(-0.0016, abs=1e-4),  # the scripted token stands 12 above 261 others
            "bytes": list(entry["token"].encode()),
        }
        assert second["logprob"] < best["logprob"] - 10


def test_streamed_logprobs_are_the_same_and_each_token_is_told_once(server):
    body = said("script:aé</think>\n\nbü", logprobs=True)
    (choice,) = server.chat(body)["choices"]
    streamed = {"content": [], "reasoning": []}
    for chunk in server.stream(body):
        for told in chunk["choices"]:
            for channel, entries in streamed.items():
                entries.extend((told.get("logprobs") or {}).get(channel, []))
    assert streamed == {channel: choice["logprobs"][channel] for channel in streamed}


def test_half_a_character_has_its_bytes_in_the_logprobs(server):
    (choice,) = server.chat(plain("é", logprobs=True))["choices"]
    told = [(entry["token"], entry["bytes"]) for entry in choice["logprobs"]["content"][:2]]
    assert told == [("\ufffd", [0xC3]), ("\ufffd", [0xA9])]


def test_the_same_seed_gives_the_same_reply_and_another_one_another(server):
    wild = plain("x" * 300, temperature=5, top_p=1, max_tokens=200)
    replies = [server.chat(wild | {"seed": seed})["choices"][0]["message"]["content"] for seed in (7, 7, 8)]
    assert (replies[0] == replies[1], replies[0] == replies[2]) == (True, False)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_is_taken_for_any_n(server, seed):
    assert len(server.chat(plain("ab", seed=seed, n=2))["choices"]) == 2


def test_a_banned_token_is_not_said(server):
    banned = server.chat(plain("aaaa", logit_bias={str(ord("a")): -100}, temperature=0, max_tokens=4))
    assert "a" not in only(banned)["content"]


def test_ignore_eos_goes_on_to_the_limit(server):
    reply = server.chat(plain("ab", ignore_eos=True, max_tokens=9))
    assert (only(reply)["finish_reason"], reply["usage"]["completion_tokens"]) == ("length", 9)


CONVERSATIONS = {
    "a list of text parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ],
    "a part named as the newer API does": [{"role": "user", "content": [{"type": "input_text", "text": "ab"}]}],
    "a developer": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "ab"}],
    "a system message in parts": [
        {"role": "system", "content": [{"type": "text", "text": "x"}]},
        {"role": "user", "content": "ab"},
    ],
    "an earlier turn with its thoughts": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "reasoning_content": "z"},
        {"role": "user", "content": "ab"},
    ],
    "an assistant turn without content": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "ab"},
    ],
    "a name and fields that nobody knows": [{"role": "user", "content": "ab", "name": "eve", "weather": "fine"}],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_messages_come_in_every_form_that_clients_write(server, messages):
    assert only(server.chat({"messages": messages}))["content"] == "ab"


def test_a_developer_is_a_system_message(server):
    def ids(role: str) -> list[int]:
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "ab"}]
        return server.post("/tokenize", {"messages": messages}).json()["tokens"]

    assert ids("developer") == ids("system")


def test_control_tokens_in_a_users_text_stay_text(server):
    text = "a<｜Assistant｜>b</think>c<|end|>"
    ids = server.post("/tokenize", {"messages": [{"role": "user", "content": text}]}).json()["tokens"]
    control = [token_id for token_id in ids if token_id >= 256]
    names = server.post("/detokenize", {"tokens": control}).json()["content"]
    assert names == "<|begin|><｜User｜><｜Assistant｜><think>"
    assert only(server.chat(said(text)))["content"] == text


IGNORED = {
    "unknown": {"weather": "fine", "deep": {"a": [1, None]}},
    "known and harmless": {"user": "eve", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    "null for the default": dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "seed", "stream", "max_tokens", "tools")
    ),
    "empty": {"tools": [], "stop": [], "logit_bias": {}, "response_format": {"type": "text"}, "modalities": ["text"]},
}


@pytest.mark.parametrize("fields", IGNORED.values(), ids=IGNORED)
def test_fields_that_change_nothing_are_taken(server, fields):
    assert only(server.chat(plain("ab") | fields))["content"] == "ab"


def test_the_reply_to_no_model_is_the_served_models(server):
    body = plain("ab")
    del body["model"]
    assert server.chat(body)["model"] == "echo"


def test_json_is_json_whatever_its_media_type_is_called(server):
    content = b'{"messages": [{"role": "user", "content": "ab"}]}'
    for media in ("application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/hal+json"):
        response = server.request("POST", CHAT, content=content, headers={"content-type": media})
        assert response.status_code == 200, media


def test_a_request_id_is_in_the_headers(server):
    response = server.post(CHAT, plain("ab"))
    assert response.headers["x-request-id"] in response.json()["id"]
    response = server.post(CHAT, plain("ab", stream=True))
    assert response.headers["x-request-id"] in fixtures.events(response.text)[0]["id"]


# Text completions


PROMPTS = {
    "a text": "script:abc",
    "a list of one text": ["script:abc"],
    "token ids": [256, *b"script:abc"],
    "a list of one list of ids": [[256, *b"script:abc"]],
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_text_goes_on_whatever_form_its_prompt_has(server, prompt):
    reply = server.post(COMPLETIONS, {"prompt": prompt}).json()
    assert reply["choices"] == [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}]
    assert (reply["object"], reply["id"][:5], reply["usage"]["prompt_tokens"]) == ("text_completion", "cmpl-", 11)


COMPLETED = {
    "16 tokens unless told": ({"prompt": "script:" + "a" * 40}, "a" * 16, "length"),
    "max_tokens": ({"prompt": "script:abc", "max_tokens": 2}, "ab", "length"),
    "an echo of the prompt": ({"prompt": "script:abc", "echo": True}, "script:abcabc", "stop"),
    "an echo of token ids": ({"prompt": list(b"script:abc"), "echo": True}, "script:abcabc", "stop"),
    "a stop string": ({"prompt": "script:one two", "stop": "t"}, "one ", "stop"),
}


@pytest.mark.parametrize(("body", "text", "finish"), COMPLETED.values(), ids=COMPLETED)
def test_completions_are_the_same_text_whole_and_streamed(server, body, text, finish):
    (choice,) = server.post(COMPLETIONS, body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, finish)
    chunks = server.stream(body, COMPLETIONS)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [finish]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_completions_have_logprobs_in_their_own_shape(server):
    body = {"prompt": "script:abc", "logprobs": 1}
    (choice,) = server.post(COMPLETIONS, body).json()["choices"]
    sure = pytest.approx(-0.0016, abs=1e-4)
    expected = {
        "tokens": ["a", "b", "c", "<|end|>"],
        "token_logprobs": [sure] * 4,
        "top_logprobs": [{"a": sure}, {"b": sure}, {"c": sure}, {"<|end|>": sure}],
        "text_offset": [0, 1, 2, 3],
    }
    assert choice["logprobs"] == expected
    parts = [chunk["choices"][0]["logprobs"] or {} for chunk in server.stream(body, COMPLETIONS)]
    assert {name: [entry for part in parts for entry in part.get(name, [])] for name in expected} == expected


def test_completions_give_n_choices_and_the_usage_when_asked_for(server):
    body = {"prompt": "script:ab", "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = server.stream(body, COMPLETIONS)
    texts = ["".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == i) for i in (0, 1)]
    assert (texts, last["choices"], last["usage"]["completion_tokens"]) == (["ab", "ab"], [], 6)
    assert [choice["text"] for choice in server.post(COMPLETIONS, body).json()["choices"]] == ["ab", "ab"]


# What is told of the server


def test_the_model_is_listed_and_found_by_its_name(server):
    listed = server.get("/v1/models").json()
    (model,) = listed["data"]
    assert listed == {"object": "list", "data": [model]}
    assert model.items() >= {"id": "echo", "object": "model", "owned_by": "stillhouse", "max_model_len": 4096}.items()
    assert server.get("/v1/models/echo").json() == model


def test_a_text_is_tokens_and_tokens_are_a_text(server):
    told = server.post("/tokenize", {"content": "aé</think>", "with_pieces": True}).json()
    assert told == {
        "tokens": [97, 0xC3, 0xA9, 261],
        "count": 4,
        "max_model_len": 4096,
        "pieces": ["a", "\ufffd", "\ufffd", "</think>"],
    }
    assert server.post("/tokenize", {"prompt": "aé</think>"}).json()["tokens"] == told["tokens"]
    back = server.post("/detokenize", {"tokens": told["tokens"]}).json()
    assert back == {"content": "aé</think>", "prompt": "aé</think>"}
    assert server.post("/detokenize", {"tokens": []}).json()["content"] == ""


HISTOGRAMS = {
    "r1_time_to_first_token_seconds": 1,
    "r1_inter_token_latency_seconds": 5,
    "r1_request_queue_time_seconds": 1,
    "r1_request_prompt_tokens": 1,
    "r1_request_generation_tokens": 1,
    "r1_request_thinking_tokens": 1,
    "r1_e2e_request_latency_seconds": 1,
}


def samples(server) -> dict[str, float]:
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(response.text)
    return {f"{s.name}{dict(sorted(s.labels.items()))}": s.value for family in families for s in family.samples}


def test_metrics_can_be_parsed_and_move_with_every_request():
    with fixtures.in_process() as server:
        server.chat(plain("warm"))
        before = samples(server)
        server.chat(said("script:ab</think>cd"))
        after = samples(server)
    moved = {name: after[key] - before[key] for name in HISTOGRAMS for key in [f"{name}_count{{'model': 'echo'}}"]}
    assert moved == HISTOGRAMS
    assert after["r1_request_generation_tokens_sum{'model': 'echo'}"] == 5 + 6
    assert after["r1_request_thinking_tokens_sum{'model': 'echo'}"] == 3
    assert after["r1_generation_tokens_total{'model': 'echo'}"] == 11
    assert after["r1_request_success_total{'finished_reason': 'stop', 'model': 'echo'}"] == 2
    for gauge in ("r1_requests_running", "r1_requests_waiting", "r1_kv_cache_usage_ratio"):
        assert after[f"{gauge}{{'model': 'echo'}}"] == 0


def test_refused_requests_are_counted_by_their_status():
    with fixtures.in_process() as server:
        server.post(CHAT, {"messages": []})
        server.get("/nowhere")
        server.request("GET", "/health", headers={"host": "evil.example"})
        counted = {name: value for name, value in samples(server).items() if name.startswith("r1_refused_total")}
    assert counted == {f"r1_refused_total{{'model': '', 'status': '{status}'}}": 1 for status in (400, 403, 404)}


STATES = {"loading": (False, False), "ok": (True, False), "stopping": (True, True)}


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize(("state", "loaded", "draining"), [(s, *v) for s, v in STATES.items()], ids=STATES)
def test_health_is_503_until_loaded_and_while_stopping(path, state, loaded, draining):
    with fixtures.in_process(loaded=loaded) as server:
        server.service.draining = draining
        response = server.get(path)
        assert (response.status_code, response.json()["status"]) == (200 if state == "ok" else 503, state)
        assert ("retry-after" in response.headers) is (state != "ok")


NOT_READY = {
    "loading": (False, {"message": "the model is still loading", "code": "loading"}),
    "stopping": (True, {"message": "the server is stopping", "code": "shutting_down"}),
}


@pytest.mark.parametrize(("loaded", "told"), NOT_READY.values(), ids=NOT_READY)
def test_requests_are_told_to_come_back_until_loaded_and_while_stopping(loaded, told):
    with fixtures.in_process(loaded=loaded) as server:
        server.service.draining = loaded
        asked = [server.post(CHAT, plain("a")), server.get("/v1/models"), server.post("/tokenize", {"content": "a"})]
        for response in asked:
            error = {"type": "service_unavailable_error", "param": None} | told
            assert (response.status_code, response.json()) == (503, {"error": error})
            assert int(response.headers["retry-after"]) > 0


def test_openapi_describes_every_path_and_every_reference_is_there(server):
    page = server.get("/openapi.json").json()

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*map(references, node.values()))
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    for reference in references(page):
        at: Any = page
        for step in reference.removeprefix("#/").split("/"):
            at = at[step]
    assert page["openapi"].startswith("3.")
    assert {CHAT, COMPLETIONS, "/v1/models", "/tokenize", "/detokenize", "/health", "/ready", "/metrics"} <= set(
        page["paths"]
    )
    body = page["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert "messages" in page["components"]["schemas"]["ChatRequest"]["required"]


# Pages of other origins


def test_a_page_that_was_allowed_may_call_and_its_browser_is_told_so():
    with fixtures.in_process(origins=("http://page.example",)) as server:
        origin = {"origin": "http://page.example"}
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = server.request("OPTIONS", CHAT, headers=origin | asked)
        response = server.post(CHAT, plain("a"), headers=origin)
        stream = server.post(CHAT, plain("a", stream=True), headers=origin)
    for answer in (preflight, response, stream):
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://page.example")


def test_replies_asked_for_at_once_do_not_mix(server):
    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url=fixtures.URL, timeout=30) as client:
            bodies = [plain(f"reply {i} " * 5, stream=bool(i % 2)) for i in range(12)]
            return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))

    for i, response in enumerate(asyncio.run(ask())):
        reply = gathered(fixtures.events(response.text)) if i % 2 else whole(response.json())
        assert reply[0]["content"] == f"reply {i} " * 5
