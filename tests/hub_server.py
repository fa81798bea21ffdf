"""A stand-in for the Hugging Face hub on 127.0.0.1: the few paths that huggingface_hub and `r1/download.py` ask for.

Repositories are dictionaries of bytes; `cuts`, `wrong` and `denied` make it fail in the ways a real hub does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass
class Hub:
    """What the hub has, how it fails, and what it was asked."""

    repositories: dict[str, dict[str, bytes]]
    cuts: dict[str, int] = field(default_factory=dict)  # file: bytes after which the connection ends, once
    refused_after_cut: int = 0  # downloads answered with 503 after a cut
    wrong: set[str] = field(default_factory=set)  # files whose bytes are not what their hash says
    denied: dict[str, tuple[int, str]] = field(default_factory=dict)  # repository: (status, the hub's error code)
    ranges: bool = True
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, Range header)
    url: str = ""

    def downloads(self) -> list[tuple[str, str]]:
        """(file, Range) of every GET of a file."""
        return [
            (path.rpartition("/")[2], area)
            for method, path, area in self.asked
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        match = api or file
        repository = match[1] if match else ""
        if repository not in hub.repositories:
            return self._fail(404, "RepoNotFound")
        if file and repository in hub.denied:
            return self._fail(*hub.denied[repository])
        files = hub.repositories[repository]
        if api:
            return self._send_json(
                {"id": repository, "sha": COMMIT, "siblings": [_sibling(name, data) for name, data in files.items()]}
            )
        assert file is not None
        if file[2] not in files:
            return self._fail(404, "EntryNotFound")
        self._send_file(hub, file[2], files[file[2]], body)

    def _send_file(self, hub: Hub, name: str, data: bytes, body: bool) -> None:
        if body and hub.refused_after_cut and name not in hub.cuts:
            hub.refused_after_cut -= 1
            return self._fail(503, "")
        etag = _sha256(data) if _is_large(name) else hashlib.sha1(data).hexdigest()
        if name in hub.wrong:
            data = data[:-1] + bytes([data[-1] ^ 1])
        area = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if hub.ranges else None
        start = int(area[1]) if area else 0
        self.send_response(206 if area else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if _is_large(name):
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if area:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        if name in hub.cuts:
            self.wfile.write(data[start : hub.cuts.pop(name)])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _is_large(name: str) -> bool:
    return name.endswith((".gguf", ".safetensors"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if _is_large(name):
        sibling["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 135}
    return sibling


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


def start(hub: Hub) -> ThreadingHTTPServer:
    """Serve `hub` from a thread; its `url` is filled in. Stop it with `shutdown()` and `server_close()`."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub  # type: ignore[attr-defined]
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
