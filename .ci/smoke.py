"""What CI asks of a wheel that is installed in a fresh environment. Standard library only.

smoke.py requirement NAME   print what pyproject.toml asks of a package: `llama-cpp-python>=0.3.36,<0.4`
smoke.py serve              start the installed `stillhouse` from an empty folder, ask it something, and stop it
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PROGRAM = str(Path(sys.executable).with_name("stillhouse"))
START_S, REPLY_S, STOP_S = 180, 120, 60


def requirement(name: str) -> str:
    """The line of pyproject.toml that names a package (Python 3.10 has no TOML reader)."""
    text = Path(__file__).resolve().parent.parent.joinpath("pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'"({re.escape(name)}[^"]*)"', text)
    assert found, f"pyproject.toml does not ask for {name}"
    return found[1]


def say(*arguments: str) -> str:
    """What a command prints; it has to end with 0."""
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"stillhouse {' '.join(arguments)} ended with {done.returncode}: {done.stderr}"
    return done.stdout


def ask(url: str, body: dict | None = None, timeout_s: float = 10) -> dict:
    """One request, JSON both ways."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        return json.load(reply)


def until_ready(url: str, server: subprocess.Popen) -> None:
    """Wait until /ready says yes; a server that ends before is an error."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended with {server.returncode} before it was ready"
        try:
            ask(f"{url}/ready")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"not ready after {START_S} s")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve() -> None:
    """From an empty folder, so that the checkout cannot be imported by accident."""
    assert "stillhouse serve" in say("--help")
    print("  ", say("--version").strip())
    assert {"smollm2:135m", "smollm2-think:135m"} <= set(say("list").split())
    assert "Q4_K_M" in say("quantize", "--help")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([PROGRAM, "serve", "--port", str(port), "--context", "1024"])
    try:
        until_ready(url, server)
        question = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 200, "seed": 1}
        reply = ask(f"{url}/v1/chat/completions", question, REPLY_S)
        message = reply["choices"][0]["message"]
        assert message["content"] and message["reasoning_content"], reply
        assert reply["usage"]["completion_tokens"] > 0, reply
        print("   it says:", json.dumps(message["content"]))
        server.send_signal(signal.SIGTERM)
        assert server.wait(STOP_S) == 0, f"SIGTERM: exit code {server.returncode}"
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["requirement"]:
        print(requirement(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            serve()
            os.chdir("/")
