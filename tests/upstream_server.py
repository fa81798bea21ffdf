"""A server as another program might be: it says what a test wants, byte for byte, and remembers what it heard."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str, Iterable[bytes]]
"""Status, content type, the pieces of the body as they are sent; the connection is closed behind them."""


def as_json(value: Any, status: int = 200) -> Answer:
    return status, "application/json", [json.dumps(value).encode()]


def as_events(*events: Any, done: bool = True) -> Answer:
    sent = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode() for event in events]
    return 200, "text/event-stream", [*sent, *([b"data: [DONE]\n\n"] if done else [])]


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """One chunk of a chat."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


class UpstreamServer:
    """Answers `/v1/models` as a server with one model does, and everything else by `script(path, body)`."""

    def __init__(self, script: Callable[[str, dict[str, Any]], Answer], models: Answer | None = None) -> None:
        self.heard: list[tuple[str, dict[str, Any], str]] = []  # path, body, Authorization
        listed = models or as_json({"object": "list", "data": [{"id": "theirs", "object": "model"}]})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.say(listed if self.path == "/v1/models" else as_json({"error": "no such path"}, 404))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", "0"))))
                outer.heard.append((self.path, body, self.headers.get("authorization", "")))
                self.say(script(self.path, body))

            def say(self, answer: Answer) -> None:
                status, kind, pieces = answer
                self.send_response(status)
                self.send_header("content-type", kind)
                self.end_headers()
                try:
                    for piece in pieces:
                        self.wfile.write(piece)
                        self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    pass  # whoever asked has heard enough

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def bodies(self, path: str = "/v1/chat/completions") -> list[dict[str, Any]]:
        """What was asked of a path, without the question at the start."""
        return [body for heard, body, _ in self.heard if heard == path and body.get("max_tokens") != 8]

    def __enter__(self) -> UpstreamServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
