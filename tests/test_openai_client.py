"""OpenAI's own Python client against a real server process: it gets what it asks for, and errors have their names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import server_fixtures as fixtures

KEY = "sk-of-the-test"
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY}\n")
    with fixtures.Process("--api-key-file", str(keys), "--parallel", "8", "--max-waiting", "64") as server:
        yield f"{server.url}/v1"
        assert "Traceback" not in server.stderr, server.stderr


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_chat_is_answered_with_its_thoughts_apart(client):
    reply = client.chat.completions.create(
        model="echo", messages=ask("script:hm</think>\n\n4"), seed=1, temperature=0.6
    )
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "4", "stop")
    assert choice.message.model_extra == {"reasoning_content": "hm"}
    assert reply.usage is not None and reply.usage.completion_tokens_details is not None
    assert (reply.usage.completion_tokens, reply.usage.completion_tokens_details.reasoning_tokens) == (7, 3)


def test_a_stream_gives_the_same_text_in_pieces(client):
    stream = client.chat.completions.create(
        model="echo", messages=ask("script:hm</think>\n\nfour ž"), stream=True, stream_options={"include_usage": True}
    )
    thoughts = answer = ""
    for chunk in stream:
        for choice in chunk.choices:
            thoughts += (choice.delta.model_extra or {}).get("reasoning_content", "")
            answer += choice.delta.content or ""
    assert (thoughts, answer) == ("hm", "four ž")
    assert chunk.usage is not None and chunk.usage.completion_tokens == 13


def test_the_clients_own_stream_helper_puts_the_reply_together(client):
    with client.chat.completions.stream(model="echo", messages=ask("script:hm</think>\n\nfour"), n=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["four", "four"]
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_leaving_a_stream_early_is_fine(client):
    for _ in range(3):
        with client.chat.completions.create(model="echo", messages=ask("hello " * 50), stream=True) as stream:
            next(iter(stream))
    assert client.chat.completions.create(model="echo", messages=ask("hello")).choices[0].message.content == "hello"


def test_n_replies_are_n_choices(client):
    reply = client.chat.completions.create(model="echo", messages=ask("ab"), n=3)
    assert [(choice.index, choice.message.content) for choice in reply.choices] == [(0, "ab"), (1, "ab"), (2, "ab")]


def test_logprobs_are_read_as_the_client_knows_them(client):
    reply = client.chat.completions.create(
        model="echo", messages=ask("script:ab"), logprobs=True, top_logprobs=2, extra_body=PLAIN
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["a", "b", "<|end|>"]
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2, 2]
    assert all(-0.01 < entry.logprob < 0 for entry in logprobs.content)


def test_texts_are_completed_whole_and_streamed(client):
    reply = client.completions.create(model="echo", prompt="script:abc", logprobs=1, max_tokens=2)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == ("ab", "length")
    assert choice.logprobs is not None and choice.logprobs.tokens == ["a", "b"]
    stream = client.completions.create(model="echo", prompt=[*b"script:abc"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abc"


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "stillhouse"


ERRORS: dict[str, tuple[type[openai.APIStatusError], dict[str, Any], str | None]] = {
    "a wrong value": (openai.BadRequestError, {"temperature": -1}, "temperature"),
    "no messages": (openai.BadRequestError, {"messages": []}, "messages"),
    "sound": (openai.BadRequestError, {"modalities": ["audio"]}, "modalities"),
    "a prompt that does not fit": (openai.BadRequestError, {"messages": ask("x" * 5000)}, "messages"),
    "a model that is not here": (openai.NotFoundError, {"model": "gpt-4o"}, "model"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("kind", "fields", "param"), ERRORS.values(), ids=ERRORS)
def test_errors_are_the_clients_own_and_name_the_field(client, kind, fields, param, stream):
    with pytest.raises(kind) as told:
        client.chat.completions.create(**{"model": "echo", "messages": ask("a"), "stream": stream} | fields)
    error = told.value
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert isinstance(error.body, dict) and set(error.body) == {"message", "type", "param", "code"}


def test_a_prompt_that_does_not_fit_has_openais_code(client):
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model="echo", messages=ask("x" * 5000))
    assert told.value.code == "context_length_exceeded"


def test_a_wrong_key_is_an_authentication_error(url):
    with openai.OpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as told:
            client.models.list()
        assert told.value.code == "invalid_api_key"


def test_a_path_that_is_not_there_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="echo", input="a")


def test_32_streams_at_once_do_not_mix(url):
    """More than the eight places: the others wait their turn."""

    async def one(client: openai.AsyncOpenAI, i: int) -> tuple[str, str]:
        text = "script:" + f"thought {i} " * 4 + "</think>\n\n" + f"answer {i} " * 6
        stream = await client.chat.completions.create(model="echo", messages=ask(text), stream=True)
        thoughts = answer = ""
        async for chunk in stream:
            delta = chunk.choices[0].delta
            thoughts += (delta.model_extra or {}).get("reasoning_content", "")
            answer += delta.content or ""
        return thoughts, answer

    async def all_of_them() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(32)))

    expected = [((f"thought {i} " * 4).rstrip(), f"answer {i} " * 6) for i in range(32)]
    assert asyncio.run(all_of_them()) == expected


@pytest.mark.slow
def test_a_real_model_answers_the_client_whole_streamed_and_several_at_once():
    with fixtures.Process("--threads", "1", "--context", "2048", model="smollm2") as server:
        greedy: dict[str, Any] = {
            "messages": ask("What is the capital of France?"),
            "temperature": 0,
            "max_tokens": 16,
        }
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            (model,) = client.models.list()
            whole = client.chat.completions.create(model=model.id, **greedy)
            stream = client.chat.completions.create(model=model.id, stream=True, **greedy)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            several = client.chat.completions.create(model=model.id, n=3, logprobs=True, **greedy)
        assert streamed.strip() and streamed == whole.choices[0].message.content
        assert [choice.message.content for choice in several.choices] == [streamed] * 3
        assert all(entry.logprob <= 0 for c in several.choices for entry in (c.logprobs and c.logprobs.content) or [])
