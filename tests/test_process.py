"""What a process of the server promises: it starts or says why not, frees what a client leaves, and ends well.

Nothing here is mocked: processes are started as a user starts them, clients are sockets that can be cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import server_fixtures as fixtures

said, plain, within, Process = fixtures.said, fixtures.plain, fixtures.within, fixtures.Process

CHAT = "/v1/chat/completions"
LONG = plain("word " * 300)  # 1,500 tokens


def command(*arguments: str, environment: dict[str, str] | None = None, model: bool = False) -> tuple[int, str, str]:
    """Run `stillhouse …` to its end: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse", *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"} | (environment or {}),
    )
    return done.returncode, done.stdout, done.stderr


class Client:
    """A client on a bare socket: it reads as it likes, and hangs up when it likes."""

    def __init__(self, server: Any, body: dict[str, Any], *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(20)
        self.socket.connect(server.host_and_port)
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.received = b""

    def read_until(self, text: bytes) -> bytes:
        while text not in self.received:
            chunk = self.socket.recv(65536)
            assert chunk, f"closed before {text!r}: {self.received!r}"
            self.received += chunk
        return self.received

    def read_to_the_end(self) -> str:
        """The rest, up to the end of a chunked or counted reply."""
        while not self.received.endswith(b"0\r\n\r\n"):
            chunk = self.socket.recv(65536)
            if not chunk:
                break
            self.received += chunk
        return self.received.decode()

    def hang_up(self) -> None:
        self.socket.close()


@pytest.fixture(scope="module")
def slow() -> Iterator[Any]:
    """Two places, a step of 5 ms: the long reply takes 8 seconds."""
    with Process("--parallel", "2", "--max-waiting", "2", step_s=0.005) as server:
        yield server
        assert "Traceback" not in server.stderr, server.stderr


@pytest.fixture
def idle(slow: Any) -> Any:
    assert within(5, lambda: slow.running() == 0)
    return slow


# Start


def test_a_server_starts_answers_and_ends_as_a_user_would_have_it():
    with Process() as server:
        reply = httpx.post(f"{server.url}{CHAT}", json=said("Hello")).json()
        assert reply["choices"][0]["message"]["content"] == "Hello"
        assert [httpx.get(f"{server.url}{path}").status_code for path in ("/health", "/ready", "/v1/models")] == [
            200
        ] * 3
        server.told_to_stop()
        assert server.exit_code() == 0
    loading, what, ready = server.stderr.splitlines()
    assert loading.startswith("loading echo")
    assert what == "echo (built in) on echo: 4096 tokens of context, 4 replies at once, 4 tokens of KV cache"
    assert ready.startswith(f"ready: {server.url}/v1 ")


def one_line_and_a_hint(stderr: str) -> list[str]:
    lines = [line for line in stderr.splitlines() if not line.startswith("loading ")]
    assert "Traceback" not in stderr
    assert len(lines) <= 2 and lines[0].startswith("error: "), stderr
    assert all(line.startswith("hint: ") for line in lines[1:]), stderr
    return lines


def test_a_port_in_use_is_told_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, stdout, stderr = command("serve", "echo", "--port", str(port))
    lines = one_line_and_a_hint(stderr)
    assert (code, stdout, lines[0]) == (2, "", f"error: port {port} is taken by another program")


HEAD = b"GGUF\x03\x00\x00\x00"
FILES = {
    "a missing file": (None, "missing.gguf"),
    "an empty file": (b"", "empty.gguf"),
    "a file that is no GGUF": (b"PK\x03\x04" + b"\x00" * 100, "zip.gguf"),
    "a GGUF of four bytes": (b"GGUF", "short.gguf"),
    "a GGUF that was cut": (HEAD + (3).to_bytes(8, "little") * 2 + b"\x01", "cut.gguf"),
    "a GGUF that claims too much": (HEAD + b"\xff" * 16, "huge.gguf"),
    "a file of another kind": (b"weights", "model.safetensors"),
}


@pytest.mark.parametrize(("data", "name"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_served_is_named_in_one_line(tmp_path, data, name):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    code, stdout, stderr = command("serve", str(path), "--port", "0")
    assert (code, stdout, name in one_line_and_a_hint(stderr)[0]) == (2, "", True), stderr


ALONE = {  # flags, environment -> in the error
    "a port of 70000": (["--port", "70000"], {}, "65535"),
    "a port of letters": (["--port", "http"], {}, "'http'"),
    "no places": (["--parallel", "0"], {}, "'0'"),
    "a negative context": (["--context", "-5"], {}, ""),
    "a flag that is not there": (["--gpu"], {}, ""),
    "a grace that is no number": (["--grace", "nan"], {}, "'nan'"),
    "a negative grace": (["--grace=-1"], {}, "'-1'"),
    "flash attention of another kind": (["--flash-attention", "maybe"], {}, "'maybe'"),
    "a bad port in the environment": ([], {"STILLHOUSE_PORT": "x"}, "'x'"),
    "a bad switch in the environment": ([], {"STILLHOUSE_FLASH_ATTENTION": "maybe"}, "'maybe'"),
    "two models": (["other"], {}, ""),
}


@pytest.mark.parametrize(("flags", "environment", "words"), ALONE.values(), ids=ALONE)
def test_a_wrong_flag_is_told_with_its_limit(flags, environment, words):
    code, stdout, stderr = command("serve", "echo", *flags, environment=environment)
    error, hint = one_line_and_a_hint(stderr)
    assert (code, stdout, words in error) == (2, "", True), stderr
    assert hint == "hint: stillhouse serve --help tells what there is"


@pytest.mark.parametrize("words", [["chat", "--seed", "x"], ["list", "--nope"], ["rm"], ["conformance"]], ids=" ".join)
def test_a_wrong_flag_of_any_command_is_told_in_one_line(words):
    code, stdout, stderr = command(*words)
    error, hint = one_line_and_a_hint(stderr)
    assert (code, stdout, error.startswith("error: ")) == (2, "", True)
    assert f"stillhouse {words[0]} --help" in hint


def test_a_key_file_or_a_template_that_cannot_be_read_is_told_in_one_line(tmp_path):
    (tmp_path / "none").write_text("# no key yet\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for flag, path, words in (
        ("--api-key-file", tmp_path / "missing", "cannot be read"),
        ("--api-key-file", tmp_path, "cannot be read"),
        ("--api-key-file", tmp_path / "binary", "cannot be read"),
        ("--api-key-file", tmp_path / "none", "holds no key"),
        ("--chat-template", tmp_path / "missing", "cannot be read"),
    ):
        code, _, stderr = command("serve", "echo", flag, str(path))
        line = one_line_and_a_hint(stderr)[0]
        assert (code, words in line, str(path) in line) == (2, True, True), stderr


@pytest.mark.parametrize("host", ["256.0.0.1", "no.such.host.invalid", "203.0.113.1"])
def test_an_address_that_is_not_ours_is_told_in_one_line(host):
    code, _, stderr = command("serve", "echo", "--port", "0", "--host", host)
    assert (code, host in stderr) == (2, True)
    assert "Traceback" not in stderr and stderr.splitlines()[-2].startswith("error: ")


def test_an_unknown_command_is_told_with_those_that_are():
    code, stdout, stderr = command("sevre", "echo")
    assert (code, stdout) == (2, "")
    assert one_line_and_a_hint(stderr)[0] == "error: there is no command 'sevre'"
    assert "serve, chat" in stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["serve", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    """`--help` is to answer in 0.3 s; what it must not import tells more than a clock on a busy machine."""
    look = (
        "import sys, atexit; from stillhouse.__main__ import main\n"
        "heavy = ['fastapi', 'starlette', 'pydantic', 'uvicorn', 'llama_cpp', 'jinja2', 'huggingface_hub', 'torch']\n"
        f"heavy += ['numpy'] if {arguments[:1] != ['serve']} else []\n"
        "atexit.register(lambda: print('heavy:', [name for name in heavy if name in sys.modules]))\n"
        f"sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "heavy: []", "")


# A client that goes away


STAGES = {"streaming": True, "not streaming": False}


@pytest.mark.parametrize("stream", STAGES.values(), ids=STAGES)
def test_a_client_that_hangs_up_frees_its_place(idle, stream):
    client = Client(idle, LONG | {"stream": stream})
    assert within(5, lambda: idle.running() == 1)
    if stream:
        client.read_until(b'"content": "o"')
    client.hang_up()
    assert within(0.5, lambda: idle.running() == 0)


def test_a_client_that_hangs_up_frees_all_of_its_n_replies(idle):
    client = Client(idle, LONG | {"n": 4, "stream": True})
    assert within(5, lambda: idle.running() == 4)
    client.hang_up()
    assert within(0.5, lambda: idle.running() == 0)


@pytest.mark.parametrize("stream", STAGES.values(), ids=STAGES)
def test_a_client_that_hangs_up_while_waiting_leaves_the_queue(idle, stream):
    running = [Client(idle, LONG | {"stream": True}) for _ in range(2)]
    assert within(5, lambda: idle.running() == 2)
    waiting = Client(idle, LONG | {"stream": stream})
    assert within(5, lambda: idle.running() == 3)
    waiting.hang_up()
    assert within(0.5, lambda: idle.running() == 2)
    for client in running:
        client.hang_up()
    assert within(0.5, lambda: idle.running() == 0)


def test_a_reply_that_was_given_up_is_counted_as_such(idle):
    def given_up() -> float:
        lines = httpx.get(f"{idle.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith('r1_cancelled_total{model="echo",re'))

    before = given_up()
    client = Client(idle, LONG | {"stream": True})
    client.read_until(b'"content": "o"')
    client.hang_up()
    assert within(1, lambda: given_up() == before + 1)


def test_a_client_that_hangs_up_before_its_request_is_whole_is_nobodys_error(idle):
    half = socket.create_connection(idle.host_and_port)
    half.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n".encode() + b'{"messages": ['
    )
    time.sleep(0.1)
    half.close()
    assert httpx.get(f"{idle.url}/health").status_code == 200
    time.sleep(0.1)
    assert "Traceback" not in idle.stderr


SLOW_TO_RENDER = """
import time
from stillhouse.backends import engine
from stillhouse.r1 import prompt
engine.Engine.read = lambda self, request: print("read ahead", file=sys.stderr, flush=True)
render = prompt.ChatTemplate.render
def slow(self, *messages, reply_follows=True, **options):
    time.sleep(0 if reply_follows else 0.05)
    return render(self, *messages, reply_follows=reply_follows, **options)
prompt.ChatTemplate.render = slow
"""


def test_the_next_turn_is_read_though_the_client_leaves_at_done():
    """OpenAI's client closes a stream at `[DONE]`; with it went what should have been read while it is idle."""
    with Process(more=SLOW_TO_RENDER) as server:
        client = Client(server, said("script:a</think>b", stream=True))
        client.read_until(b"data: [DONE]")
        client.hang_up()
        assert within(1, lambda: "read ahead" in server.stderr)


# Too many


def test_a_full_queue_is_429_and_those_in_it_are_served(idle):
    clients = [Client(idle, plain("ab" * 40, stream=True)) for _ in range(4)]
    assert within(5, lambda: idle.running() == 4)
    response = httpx.post(f"{idle.url}{CHAT}", json=plain("a"))
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert (int(response.headers["retry-after"]) > 0, error["message"]) == (
        True,
        "2 requests run and 2 wait: no more are taken",
    )
    for client in clients:
        assert "data: [DONE]" in client.read_to_the_end()
        client.hang_up()
    assert httpx.post(f"{idle.url}{CHAT}", json=plain("a")).status_code == 200


def test_a_client_that_does_not_read_stops_nobody_else():
    """Its stream is longer than every buffer on the way; the others go on, and it is given up in the end."""
    more = "stream._SEND_TIMEOUT_S = 0.3"
    with Process("--parallel", "4", "--context", "200000", step_s=0.0001, more=more) as server:
        sleeper = Client(server, plain("x" * 60_000, stream=True, logprobs=True, top_logprobs=20), receive_buffer=4096)
        sleeper.read_until(b"data: ")
        for _ in range(3):
            response = httpx.post(f"{server.url}{CHAT}", json=plain("hello" * 20), timeout=20)
            assert response.json()["choices"][0]["message"]["content"] == "hello" * 20
        assert within(60, lambda: server.running() == 0)
        sleeper.hang_up()
        assert httpx.get(f"{server.url}/health").status_code == 200
    assert "Traceback" not in server.stderr, server.stderr


def test_silence_is_broken_by_a_comment():
    with Process(step_s=0.25, more="stream.KEEP_ALIVE_S = 0.1") as server:
        reply = httpx.post(f"{server.url}{CHAT}", json=plain("abc", stream=True), timeout=20).text
    events = [frame for frame in reply.split("\n\n") if not frame.startswith(": ")]
    assert ": keep-alive\n\n" in reply
    assert [event["choices"][0]["delta"].get("content") for event in fixtures.events("\n\n".join(events))] == [
        "",
        "a",
        "b",
        "c",
        None,
    ]


# The end


def status(server: Any) -> int:
    return httpx.post(f"{server.url}{CHAT}", json=plain("a"), timeout=5).status_code


def test_told_to_stop_it_finishes_what_runs_and_takes_nothing_new():
    with Process(step_s=0.01) as server:
        streaming = Client(server, plain("word " * 30, stream=True))
        streaming.read_until(b'"content": "w"')
        with httpx.Client() as kept:  # a connection from before
            kept.get(f"{server.url}/health")
            server.told_to_stop()
            assert within(2, lambda: status(server) == 503)
            refused = kept.post(f"{server.url}{CHAT}", json=plain("a"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["retry-after"]) > 0
            health = kept.get(f"{server.url}/health")
            assert (health.status_code, health.json()) == (503, {"status": "stopping"})
        reply = streaming.read_to_the_end()
        streaming.hang_up()
        assert server.exit_code() == 0
    assert (reply.count("data: [DONE]"), reply.count('"content": "w"'), '"error"' in reply) == (1, 30, False)
    assert (server.stderr.count("stopping: "), "Traceback" in server.stderr) == (1, False)


def test_a_second_signal_ends_the_stream_with_an_error_event():
    with Process(step_s=0.01) as server:
        streaming, whole = Client(server, LONG | {"stream": True}), Client(server, LONG)
        streaming.read_until(b'"content": "w"')
        assert within(5, lambda: server.running() == 2)
        server.told_to_stop()
        assert within(2, lambda: status(server) == 503)
        server.told_to_stop()
        assert server.exit_code(6) == 0
        streamed, told = streaming.read_to_the_end(), whole.read_to_the_end()
        for client in (streaming, whole):
            client.hang_up()
    last = json.loads(streamed.rpartition("data: ")[2].partition("\r\n")[0])
    assert (last["error"]["type"], last["error"]["code"]) == ("service_unavailable_error", "engine_failed")
    assert "[DONE]" not in streamed
    assert told.startswith("HTTP/1.1 503 ") and '"engine_failed"' in told
    assert "Traceback" not in server.stderr, server.stderr


def test_what_outlasts_the_grace_time_is_cut():
    with Process("--grace", "0.3", step_s=0.01) as server:
        streaming = Client(server, LONG | {"stream": True})
        streaming.read_until(b'"content": "w"')
        server.told_to_stop()
        assert server.exit_code(6) == 0
        assert '"engine_failed"' in streaming.read_to_the_end()
        streaming.hang_up()


def test_told_to_stop_while_loading_it_stops():
    more = "import time, threading\nfrom stillhouse.server import model\nmodel.load = lambda *a, **k: time.sleep(60)"
    server = Process(more=more)
    try:
        assert within(20, lambda: "loading echo" in server.stderr)
        time.sleep(0.5)
        server.told_to_stop()
        assert server.exit_code(5) == 0
    finally:
        server.end()
    assert "Traceback" not in server.stderr, server.stderr


def test_health_says_that_it_loads():
    with contextlib.ExitStack() as stack:
        free = stack.enter_context(socket.socket())
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        more = "import time\nfrom stillhouse.server import model\nmodel.load = lambda *a, **k: time.sleep(60)"
        server = Process("--port", str(port), more=more)
        stack.callback(server.end)

        def loading() -> bool:
            with contextlib.suppress(httpx.TransportError):
                response = httpx.get(f"http://127.0.0.1:{port}/health")
                return (response.status_code, response.json()) == (503, {"status": "loading"})
            return False

        assert within(20, loading)
        response = httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=plain("a"))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")


def test_an_idle_server_stops_at_once():
    with Process() as server, httpx.Client() as kept:
        kept.get(f"{server.url}/health")  # its connection stays open
        server.told_to_stop()
        assert server.exit_code(3) == 0


# Keys


def test_keys_of_a_file_open_and_health_needs_none(tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("# ours\nsk-first\n\n  sk-second  \n")
    with Process("--api-key-file", str(keys)) as server:
        asked = {
            key: httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code
            for key in ("sk-first", "sk-second", "sk-third", "# ours")
        }
        assert asked == {"sk-first": 200, "sk-second": 200, "sk-third": 401, "# ours": 401}
        assert [httpx.get(f"{server.url}{path}").status_code for path in ("/health", "/ready", "/metrics")] == [
            200,
            200,
            401,
        ]
    assert "sk-" not in server.stderr


WAYS_ROUND = {  # as they stand on the wire -> status: what is open is open by its whole path, not by its beginning
    "/page/../metrics": 404,
    "/page/%2e%2e/metrics": 404,
    "/page/..%2fmetrics": 404,
    "/page//etc/passwd": 404,
    "//metrics": 401,
    "/health/../metrics": 401,
    "/health%00": 401,
    "/HEALTH": 401,
    "http://x/health/../metrics": 401,
}


def test_no_spelling_of_a_path_gets_round_the_key(monkeypatch):
    monkeypatch.setenv("STILLHOUSE_API_KEY", "sk-env")
    with Process() as server:
        told = {}
        for path in WAYS_ROUND:
            with socket.create_connection(server.host_and_port, timeout=10) as raw:
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                told[path] = int(raw.recv(65536).split()[1])
    assert told == WAYS_ROUND


def test_a_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("STILLHOUSE_API_KEY", "sk-env")
    with Process() as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": "sk-env"}).status_code == 200


def test_a_server_that_anyone_can_reach_warns_unless_it_asks_for_a_key(monkeypatch):
    warned = []
    for key in ("", "sk-env"):
        monkeypatch.setenv("STILLHOUSE_API_KEY", key)
        with Process("--host", "0.0.0.0") as server:
            warned.append("warning: anyone who can reach 0.0.0.0" in server.stderr)
    assert warned == [True, False]


# Odd clients

RAW = {
    "a host that pretends to be a path": (b"GET /health HTTP/1.1\r\nHost: x/health?\r\n\r\n", b" 403 "),
    "no host at all": (b"GET /v1/models HTTP/1.0\r\n\r\n", b" 403 "),
    "no HTTP": (b"\x16\x03\x01\x00\xa5hello\r\n\r\n", b" 400 "),
    "a length that is none": (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b" 400 "),
    "a length over the limit": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
        b" 413 ",
    ),
}


@pytest.mark.parametrize(("sent", "told"), RAW.values(), ids=RAW)
def test_what_is_hardly_http_gets_an_answer(idle, sent, told):
    with socket.create_connection(idle.host_and_port, timeout=10) as raw:
        raw.sendall(sent)
        assert told in raw.recv(65536).partition(b"\r\n")[0]


def test_connections_that_never_ask_stop_nobody(idle):
    half_open = [socket.create_connection(idle.host_and_port) for _ in range(200)]
    for connection in half_open:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local")
    assert httpx.post(f"{idle.url}{CHAT}", json=plain("a"), timeout=5).status_code == 200
    for connection in half_open:
        connection.close()


# A real model


@pytest.mark.slow
def test_a_real_model_is_served_and_a_client_that_is_killed_in_mid_stream_frees_its_place():
    """The whole way: the embedded model, a client process that asks for a long reply, and `kill -9`."""
    with Process("--threads", "1", "--parallel", "2", "--context", "4096", model="smollm2") as server:
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24}
        reply = httpx.post(f"{server.url}{CHAT}", json=body | {"temperature": 0}, timeout=120).json()
        assert reply["choices"][0]["message"]["content"].strip() and reply["usage"]["completion_tokens"] <= 24
        long = {
            "messages": [{"role": "user", "content": "Count."}],
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
        }
        code = (
            "import httpx, sys\n"
            f"with httpx.stream('POST', {server.url + CHAT!r}, json={long!r}, timeout=60) as reply:\n"
            "    for line in reply.iter_lines():\n"
            "        print(line, flush=True)"
        )
        killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        try:
            assert killed.stdout is not None
            for _ in range(10):
                assert killed.stdout.readline()
            assert server.running() == 1
        finally:
            killed.kill()
            killed.wait()
            killed.stdout.close()
        assert within(1, lambda: server.running() == 0)
        again = httpx.post(f"{server.url}{CHAT}", json=body | {"temperature": 0}, timeout=120).json()
        assert again["choices"] == reply["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        server.told_to_stop()
        assert server.exit_code() == 0


def test_threads_do_not_outlive_a_service():
    before = threading.active_count()
    with fixtures.in_process() as server:
        server.chat(plain("a"))
    assert within(5, lambda: threading.active_count() <= before)


@pytest.mark.slow
def test_the_default_model_thinks_and_answers_and_the_bare_one_has_no_thoughts():
    def ask(server: Process, words: str, **more: object) -> dict:
        body = {"messages": [{"role": "user", "content": words}], "max_tokens": 200, "temperature": 0, **more}
        return httpx.post(f"{server.url}{CHAT}", json=body, timeout=120).json()["choices"][0]

    flags = ("--threads", "1", "--context", "2048")
    with Process(*flags, model="smollm2-think") as server:
        for words in ("What is 4 + 5?", "hello"):
            choice = ask(server, words)
            said, thought = choice["message"]["content"], choice["message"]["reasoning_content"]
            assert (
                said.strip()
                and thought.strip()
                and choice["finish_reason"] == "stop"
                and "think>" not in said + thought
            )
        silent = ask(server, "What is 4 + 5?", chat_template_kwargs={"enable_thinking": False})["message"]
        assert silent["content"].strip() and not silent.get("reasoning_content")
        (told,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert (told["id"], told["meta"]["thinks"]) == ("smollm2-think:135m", True)
    with Process(*flags, model="smollm2") as server:
        assert not ask(server, "What is 4 + 5?")["message"].get("reasoning_content")
