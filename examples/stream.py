"""Stream one reply with the standard library alone: thoughts to stderr, answer to stdout.

python examples/stream.py "What is 17 * 23?" [http://127.0.0.1:8000]
"""

import json
import sys
import urllib.request
from collections.abc import Iterator


def events(url: str, body: dict) -> Iterator[dict]:
    """The chunks of a stream, as they come. An error in the middle is raised, one before it is urllib's."""
    data = json.dumps(body | {"stream": True}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if not line.startswith(b"data: "):  # an empty line, or a comment that keeps the connection alive
                continue
            if line.strip() == b"data: [DONE]":
                return
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            yield chunk


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of France?"
    server = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000"
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 512}
    for chunk in events(f"{server}/v1/chat/completions", body):
        for choice in chunk["choices"]:
            print(choice["delta"].get("reasoning_content", ""), end="", file=sys.stderr, flush=True)
            print(choice["delta"].get("content", ""), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
