"""What the conformance suite promises: ours passes it, a server that does it wrong fails it, and it says which case."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from stillhouse.__main__ import main
from stillhouse.r1.errors import UserError
from stillhouse.server.conformance import cli  # noqa: F401 - puts the cases on their list
from stillhouse.server.conformance.client import Broken, Client, Refused, gather, read_reply
from stillhouse.server.conformance.suite import CASES, run_cases
from stillhouse.server.conformance.target import Target

if "server_fixtures" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("server_fixtures", Path(__file__).with_name("server_fixtures.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])
Process = sys.modules["server_fixtures"].Process

SIGN_OF_LIFE = 41  # waits for the comment that comes after 15 s
PASSED_BY_NONSENSE = 20  # the other cases need a reply that says what they are about
FAILED_BY_NONSENSE = {13, 29}  # they want words, or a whole JSON, in fewer tokens than bytes of nonsense take
NOT_ON_ECHO = {20, 28, 35}  # no speculation, no KV cache


def verdicts(url: str, only: set[int] | None = None) -> dict[int, str]:
    return {result.number: result.verdict for result in run_cases(Target(Client(f"{url}/v1", timeout_s=60)), only)}


@pytest.fixture(scope="module")
def echo() -> Iterator[Any]:
    with Process() as server:
        yield server


def test_there_are_44_cases_and_each_asks_a_question():
    assert sorted(CASES) == list(range(1, 45))
    assert all(case.question.endswith("?") and len(case.name) <= 34 for case in CASES.values())


def test_ours_passes_every_case_that_it_serves(echo):
    found = verdicts(echo.url, set(CASES) - {SIGN_OF_LIFE})
    assert {number for number, verdict in found.items() if verdict == "fail"} == set()
    assert {number for number, verdict in found.items() if verdict == "n/a"} == NOT_ON_ECHO
    assert sum(verdict == "pass" for verdict in found.values()) == 43 - len(NOT_ON_ECHO)


@pytest.mark.slow
def test_ours_says_that_it_lives_while_a_request_waits(echo):
    assert verdicts(echo.url, {SIGN_OF_LIFE}) == {SIGN_OF_LIFE: "pass"}


@pytest.mark.slow
def test_a_model_without_thoughts_is_asked_only_what_concerns_it():
    with Process("--context", "2048", model="smollm2:135m") as server:
        found = verdicts(server.url, set(CASES) - {SIGN_OF_LIFE})
    assert {number for number, verdict in found.items() if verdict == "pass"} == {27, 39, 40}
    assert {number for number, verdict in found.items() if verdict == "fail"} == set()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch", "mlx"])
def test_checkpoints_through_every_backend_are_taken_apart_rightly(backend, random_checkpoint, tmp_path):
    """Nonsense for weights, R1's template and tags: whatever it says, the server has to take it apart rightly."""
    if importlib.util.find_spec({"pytorch": "torch", "mlx": "mlx_lm"}[backend]) is None:
        pytest.skip(f"{backend} is not installed")
    model = random_checkpoint.random_model("qwen2", context=8192)
    folder = random_checkpoint.write_checkpoint(tmp_path / "random", model)
    with Process("--context", "8192", "--backend", backend, model=str(folder)) as server:
        found = verdicts(server.url, set(CASES) - {SIGN_OF_LIFE})
    assert {number for number, verdict in found.items() if verdict == "fail"} <= FAILED_BY_NONSENSE
    assert sum(verdict == "pass" for verdict in found.values()) >= PASSED_BY_NONSENSE


class Leaky(BaseHTTPRequestHandler):
    """A server that passes for a scripted one and puts all of a reply in `content`, thoughts and tags."""

    models: ClassVar[Any] = {"data": [{"id": "leaky", "owned_by": "nobody", "meta": {"backend": "echo"}}]}

    def do_GET(self) -> None:
        self.answer(json.dumps(self.models), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"].removeprefix("script:")
        usage = {"prompt_tokens": 9, "completion_tokens": len(text)}
        if not body.get("stream"):
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            return self.answer(json.dumps({"choices": [choice], "usage": usage}), "application/json")
        deltas = [{"role": "assistant", "content": ""}, *({"content": letter} for letter in text)]
        chunks = [{"choices": [{"delta": delta}]} for delta in deltas]
        chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": usage})
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        return self.answer(events + "data: [DONE]\n\n", "text/event-stream")

    def answer(self, text: str, media: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", media)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def leaky() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Leaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_leaks_thoughts_fails_and_passes_only_what_has_none(leaky):
    found = verdicts(leaky, set(CASES) - {SIGN_OF_LIFE})
    assert {number for number, verdict in found.items() if verdict == "pass"} == {
        17,  # an answer without thoughts is all that it can do
        34,  # it tells the same size for every prompt
    }
    assert {number for number, verdict in found.items() if verdict == "n/a"} == {20, 28, 35, 40, 42}


def test_the_command_tells_case_by_case_and_exits_with_1_where_one_fails(leaky, capsys):
    assert main(["conformance", f"{leaky}/v1", "--only", "1,17"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["1", "fail"] and lines[2].split()[:2] == ["17", "pass"]
    assert lines[3] == "1 of 2 pass, 0 not applicable"


def test_the_command_can_speak_to_machines(leaky, capsys):
    assert main(["conformance", f"{leaky}/v1", "--only", "17", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["score"] == {"passed": 1, "failed": 0, "not_applicable": 0}
    assert [(case["number"], case["verdict"]) for case in told["cases"]] == [(17, "pass")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://127.0.0.1:9/v1"], "error: the server cannot be reached: Connection refused\n"),
        (["ftp://somewhere"], "error: 'ftp://somewhere' is not the address of a server\n"),
        (["http://host:high"], "error: 'http://host:high' is not the address of a server\n"),
        (["http://127.0.0.1:9/v1", "--only", "45"], "error: there is no case 45\n"),
    ],
)
def test_what_cannot_be_tried_is_told_in_one_line(arguments, words, capsys):
    assert main(["conformance", *arguments]) == 2
    assert capsys.readouterr().err.startswith(words)


def test_a_model_that_is_not_there_is_told_with_those_that_are(leaky):
    with pytest.raises(UserError, match=r"no model 'other' \(it has leaky\)"):
        Target(Client(leaky), "other")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_found_under_every_name(name):
    message = {"choices": [{"message": {name: "two", "content": None}, "finish_reason": "length"}]}
    assert (read_reply(message).reasoning, read_reply(message).content) == ("two", "")
    assert gather([{"choices": [{"delta": {name: part}}]} for part in ("t", "wo")]).reasoning == "two"


def test_a_stream_is_put_together_with_its_other_choices_left_out():
    reply = gather(
        [
            {"id": "a", "choices": [{"index": 0, "delta": {"content": "fo"}}]},
            {"id": "a", "choices": [{"index": 1, "delta": {"content": "six"}}]},
            {"id": "a", "choices": [{"index": 0, "delta": {"content": "ur"}, "finish_reason": "stop"}]},
            {"id": "a", "choices": [], "usage": {"completion_tokens_details": {"reasoning_tokens": 3}}},
        ]
    )
    assert (reply.content, reply.finish, reply.reasoning_tokens) == ("four", "stop", 3)


def test_what_is_no_reply_is_told_so():
    with pytest.raises(Broken, match="no chat completion"):
        read_reply({"detail": "what?"})


def test_a_refusal_keeps_its_parameter(echo):
    with pytest.raises(Refused) as refused:
        Client(f"{echo.url}/v1").chat({"messages": [], "thinking_budget": -1})
    assert refused.value.status == 400 and refused.value.param
