"""A server to ask, without a model: the echo backend in this process, or the command a user types in one of its own.

A question that begins with `script:` is the reply itself, one byte a token: `script:thoughts</think>\\n\\nanswer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from stillhouse.backends.echo import Echo
from stillhouse.backends.open import Opened
from stillhouse.server.app import Service, create_app
from stillhouse.server.model import serve_opened
from stillhouse.server.settings import Settings

URL = "http://127.0.0.1"
# What `python -c` runs to serve an echo that takes its time: a stream then lasts long enough to be cut.
SLOW = """
import sys
from stillhouse.__main__ import main
from stillhouse.backends import echo
from stillhouse.server import stream
echo.Echo.__init__.__kwdefaults__["step_s"] = {step_s}
{more}
sys.exit(main())
"""


def said(text: str, **fields: Any) -> dict[str, Any]:
    """A chat request with one question."""
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def plain(text: str, **fields: Any) -> dict[str, Any]:
    """A chat request whose reply is `text`, without thoughts."""
    return said(f"script:{text}", chat_template_kwargs={"enable_thinking": False}, **fields)


def events(body: str) -> list[Any]:
    """The events of a stream: every one a single `data:` line, the last one `[DONE]`."""
    frames = body.split("\n\n")
    assert frames.pop() == "", "a stream ends with an empty line"
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames), frames
    assert [frame for frame in frames if frame == "data: [DONE]"] == frames[-1:], "[DONE] comes once, at the end"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


class InProcess:
    """The application on the echo backend, asked through ASGI: no socket, no port."""

    def __init__(self, *, loaded: bool = True, step_s: float = 0.0, context: int = 4096, **settings: Any) -> None:
        self.service = Service(Settings(**settings))
        self.app = create_app(self.service)
        if loaded:
            opened = Opened(Echo(context_length=context, step_s=step_s), None, "<|begin|>", "<|end|>")
            self.service.ready(serve_opened("echo", opened, source="built in"))

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, and the whole response."""

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url=URL, timeout=30) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A whole reply."""
        response = self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[Any]:
        """The events of a streamed reply, without `[DONE]`."""
        response = self.post(path, body | {"stream": True})
        assert (response.status_code, response.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
        return events(response.text)

    def service_paths(self) -> list[str]:
        """Every path that the application knows."""
        return [route.path.replace("{name:path}", "x").replace("{reply_id}", "x") for route in self.app.routes]

    def close(self) -> None:
        self.service.close()


class Process:
    """`stillhouse serve …` in a process of its own, as a user starts it."""

    def __init__(
        self,
        *flags: str,
        step_s: float = 0.0,
        more: str = "",
        model: str = "echo",
        command: tuple[str, ...] = ("serve",),
    ) -> None:
        start = ["-c", SLOW.format(step_s=step_s, more=more)] if step_s or more else ["-m", "stillhouse"]
        self.lines: list[str] = []  # of stderr
        self.url = ""
        self._announced = threading.Event()
        self.popen = subprocess.Popen(
            [sys.executable, *start, *command, model, "--port", "0", *flags],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Process:
        assert self._announced.wait(120) and self.url, self.stderr
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return "".join(self.lines)

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def running(self) -> float:
        """Replies in progress and waiting, as `/metrics` tells."""
        page = httpx.get(f"{self.url}/metrics").text.splitlines()
        names = ("r1_requests_running{", "r1_requests_waiting{")
        return sum(float(line.rpartition(" ")[2]) for line in page if line.startswith(names))

    def told_to_stop(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def exit_code(self, within_s: float = 15) -> int:
        code = self.popen.wait(within_s)
        self._reader.join(5)
        return code

    def end(self) -> None:
        """End it however it stands, and let nothing of it stay."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.exit_code()
        if self.popen.stderr:
            self.popen.stderr.close()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        with contextlib.suppress(ValueError):  # closed under us
            for line in self.popen.stderr:
                self.lines.append(line)
                if line.startswith("ready: "):
                    self.url = line.split()[1].removesuffix("/v1")
                    self._announced.set()
        self._announced.set()


def within(limit_s: float, is_so: Callable[[], bool]) -> bool:
    """Whether something comes to be so in time."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def in_process(**options: Any) -> Iterator[InProcess]:
    server = InProcess(**options)
    try:
        yield server
    finally:
        server.close()
