"""Structured output and tools through clients that nobody here wrote, against a real server process.

The echo says what it is told to (`script:…`), so that what a client makes of a reply can be compared word for word; the
embedded model says what it likes, so that only the form is compared.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import server_fixtures as fixtures
from pydantic import BaseModel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the clients' own warnings are theirs


class City(BaseModel):
    name: str
    size: Literal["small", "large"]


JSON = '{"name": "Oslo", "size": "small"}'
ANSWER = f"script:hm</think>\n\n{JSON}"
CALL = 'script:hm</think>\n\n<tool_call>\n{"name": "City", "arguments": ' + JSON + "}\n</tool_call>"
OSLO = City(name="Oslo", size="small")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
WEATHER_CALL = 'script:hm</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module", autouse=True)
def sweep() -> Iterator[None]:
    """What others' clients leave open is swept up here, and not complained of in the middle of somebody else's test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.set_event_loop(None)  # pydantic-ai leaves one set, where no collection finds it
        gc.collect()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with fixtures.Process() as server:
        yield f"{server.url}/v1"


@pytest.fixture(scope="module")
def real_url(smollm2_path: Path) -> Iterator[str]:
    with fixtures.Process("--threads", "1", "--context", "2048", model=str(smollm2_path)) as server:
        yield f"{server.url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def real_client(real_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real_url, api_key="none", max_retries=0) as client:
        yield client


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# openai


def test_openai_parses_an_answer_into_a_class(client):
    reply = client.beta.chat.completions.parse(model="echo", messages=ask(ANSWER), response_format=City)
    assert (reply.choices[0].message.parsed, reply.choices[0].finish_reason) == (OSLO, "stop")


def test_openai_parses_a_stream_into_a_class(client):
    with client.beta.chat.completions.stream(model="echo", messages=ask(ANSWER), response_format=City) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == OSLO
    assert {"content.delta", "content.done"} <= kinds


def test_openai_is_told_of_an_answer_that_was_cut(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.beta.chat.completions.parse(model="echo", messages=ask(ANSWER), response_format=City, max_tokens=15)


def test_openai_hears_calls_and_sends_their_results(client):
    messages = ask(WEATHER_CALL)
    first = client.chat.completions.create(model="echo", messages=messages, tools=[WEATHER])
    (call,) = first.choices[0].message.tool_calls
    assert (first.choices[0].finish_reason, json.loads(call.function.arguments)) == ("tool_calls", {"city": "Oslo"})
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    messages += ask("script:hm</think>\n\nIt is sunny.")
    second = client.chat.completions.create(model="echo", messages=messages, tools=[WEATHER])
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("It is sunny.", "stop")


def test_openai_hears_calls_as_they_are_written(client):
    arguments: list[str] = []
    tools = [openai.pydantic_function_tool(City)]
    with client.beta.chat.completions.stream(model="echo", messages=ask(CALL), tools=tools) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                arguments.append(event.arguments_delta)
        message = stream.get_final_completion().choices[0].message
    assert len(arguments) > 5 and "".join(arguments) == JSON
    assert message.tool_calls[0].function.parsed_arguments == OSLO


# langchain-openai


def langchain(url: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        langchain_openai = pytest.importorskip("langchain_openai", reason="pip install stillhouse[clients]")
    return langchain_openai.ChatOpenAI(base_url=url, api_key="none", model="echo", temperature=0, max_retries=0)


@pytest.mark.parametrize(
    ("method", "script"), [("json_schema", ANSWER), ("json_mode", ANSWER), ("function_calling", CALL)]
)
def test_langchain_has_structured_output(url, method, script):
    assert langchain(url).with_structured_output(City, method=method).invoke(script) == OSLO


def test_langchain_binds_tools(url):
    bound = langchain(url).bind_tools([City])
    assert [(call["name"], call["args"]) for call in bound.invoke(CALL).tool_calls] == [("City", OSLO.model_dump())]
    whole = None
    for chunk in bound.stream(CALL):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.tool_calls[0]["args"] == OSLO.model_dump()
    forced = langchain(url).bind_tools([WEATHER], tool_choice="get_weather", parallel_tool_calls=False)
    assert forced.invoke("script:hm</think>\n\nno").tool_calls[0]["args"]["city"] in ("Oslo", "Rome")


# instructor


@pytest.mark.parametrize(("mode", "script"), [("TOOLS", CALL), ("JSON", ANSWER), ("JSON_SCHEMA", ANSWER)])
def test_instructor_gives_an_object(url, mode, script):
    instructor = pytest.importorskip("instructor", reason="pip install stillhouse[clients]")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        patched = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
        told = patched.chat.completions.create(model="echo", messages=ask(script), response_model=City)
        assert told.model_dump() == OSLO.model_dump()  # of a class of its own


# pydantic-ai


def test_pydantic_ai_calls_a_tool_and_gives_an_object(url):
    pytest.importorskip("pydantic_ai", reason="pip install stillhouse[clients]")
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("echo", provider=OpenAIProvider(base_url=url, api_key="none"))
    assert Agent(model, output_type=NativeOutput(City)).run_sync(ANSWER).output == OSLO
    call = CALL.replace('"City"', '"final_result"')
    assert Agent(model, output_type=City).run_sync(call).output == OSLO
    asked: list[str] = []
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather now."""
        asked.append(city)
        return "sunny"

    # The echo says the results again, since they are the last that it is told.
    assert "sunny" in agent.run_sync(WEATHER_CALL).output
    assert asked == ["Oslo"]


# litellm


def test_litellm_has_both(url, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="pip install stillhouse[clients]")
    options: Any = {"model": "openai/echo", "api_base": url, "api_key": "none", "num_retries": 0}
    reply = litellm.completion(messages=ask(ANSWER), response_format=City, **options)
    assert City.model_validate_json(reply.choices[0].message.content) == OSLO
    reply = litellm.completion(messages=ask(WEATHER_CALL), tools=[WEATHER], **options)
    assert json.loads(reply.choices[0].message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    chunks = list(litellm.completion(messages=ask(WEATHER_CALL), tools=[WEATHER], stream=True, **options))
    built = litellm.stream_chunk_builder(chunks)
    assert json.loads(built.choices[0].message.tool_calls[0].function.arguments) == {"city": "Oslo"}


# Node

NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL, apiKey: "none", maxRetries: 0 });
const schema = { type: "object", properties: { name: { type: "string" }, size: { enum: ["small", "large"] } },
  required: ["name", "size"], additionalProperties: false };
const ask = (content) => [{ role: "user", content }];
const parsed = await client.chat.completions.parse({ model: "echo", messages: ask(process.env.ANSWER),
  response_format: { type: "json_schema", json_schema: { name: "city", strict: true, schema } } });
const stream = client.chat.completions.stream({ model: "echo", messages: ask(process.env.CALL),
  tools: [{ type: "function", function: { name: "City", parameters: schema } }] });
const final = await stream.finalChatCompletion();
console.log(JSON.stringify({ parsed: parsed.choices[0].message.parsed,
  call: JSON.parse(final.choices[0].message.tool_calls[0].function.arguments),
  finish: final.choices[0].finish_reason }));
"""


def test_the_npm_package_has_both(url, tmp_path):
    node, folder = shutil.which("node"), Path(sys.prefix) / "share" / "node"
    if not (node and (folder / "node_modules" / "openai").is_dir()):
        pytest.skip(f"Node is not there, or no openai in it: npm install --prefix {folder} openai")
    (tmp_path / "node_modules").symlink_to(folder / "node_modules")
    (tmp_path / "ask.mjs").write_text(NODE)
    env = os.environ | {"URL": url, "ANSWER": ANSWER, "CALL": CALL}
    run = subprocess.run([node, "ask.mjs"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    city = OSLO.model_dump()
    assert json.loads(run.stdout) == {"parsed": city, "call": city, "finish": "tool_calls"}


# The embedded model


def test_a_real_model_answers_in_the_form_of_a_class(real_client):
    class Country(BaseModel):
        code: Literal["NO", "IT", "FR"]
        large: bool

    reply = real_client.beta.chat.completions.parse(
        model=real_client.models.list().data[0].id,
        messages=ask("Which country is Oslo in?"),
        response_format=Country,
        max_tokens=100,
    )
    assert reply.choices[0].message.parsed is not None


def test_a_real_models_required_call_can_be_read_a_hundred_times_of_a_hundred(real_client):
    model = real_client.models.list().data[0].id
    for seed in range(100):
        reply = real_client.chat.completions.create(
            model=model,
            messages=ask("What is the weather in Rome?"),
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=100,
            seed=seed,
        )
        (call,) = reply.choices[0].message.tool_calls or [None]
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
        assert reply.choices[0].finish_reason == "tool_calls"


def test_a_real_model_answers_when_it_has_the_result(real_client):
    model = real_client.models.list().data[0].id
    messages = ask("What is the weather in Oslo?")
    options: Any = {"model": model, "tools": [WEATHER], "max_tokens": 200, "seed": 1}
    options["parallel_tool_calls"] = False
    first = real_client.chat.completions.create(messages=messages, tool_choice="required", **options)
    (call, *_) = first.choices[0].message.tool_calls
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 20 degrees"}]
    second = real_client.chat.completions.create(messages=messages, tool_choice="none", **options)
    assert second.choices[0].message.content.strip()
