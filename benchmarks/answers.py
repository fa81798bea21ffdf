"""Does an answer always come? Asks a server many questions with a small max_tokens and counts the replies without one.

usage: python benchmarks/answers.py http://127.0.0.1:8000 [--prompts 100] [--max-tokens 256] [--streams 4]
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor


def ask(url: str, number: int, max_tokens: int) -> tuple[bool, str]:
    """One question: whether an answer came, and what ended the thoughts."""
    question = f"How many ways are there to climb {number} stairs, one or two at a time? Think it through."
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "seed": number}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        choice = json.load(reply)["choices"][0]
    answered = bool((choice["message"].get("content") or "").strip())
    return answered, str(choice.get("reasoning_closed_by"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--streams", type=int, default=4)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.streams) as pool:
        replies = list(pool.map(lambda n: ask(arguments.url, n, arguments.max_tokens), range(1, arguments.prompts + 1)))
    empty = sum(not answered for answered, _ in replies)
    print(f"{len(replies)} prompts, max_tokens {arguments.max_tokens}: {empty} without an answer")
    print("thoughts closed by:", dict(Counter(by for _, by in replies)))


if __name__ == "__main__":
    main()
