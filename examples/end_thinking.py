"""Stream a reply, and after some seconds of thoughts have the answer.

python examples/end_thinking.py 5 "Is 1009 a prime number?" [http://127.0.0.1:8000]
"""

import sys
import time
import urllib.error
import urllib.request

from stream import events


def main() -> None:
    patience_s = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    question = sys.argv[2] if len(sys.argv) > 2 else "Is 1009 a prime number?"
    server = sys.argv[3] if len(sys.argv) > 3 else "http://127.0.0.1:8000"
    began, asked = time.monotonic(), False
    for chunk in events(f"{server}/v1/chat/completions", {"messages": [{"role": "user", "content": question}]}):
        for choice in chunk["choices"]:
            delta = choice["delta"]
            print(delta.get("reasoning_content") or delta.get("content") or "", end="", flush=True)
            if "reasoning_content" in delta and not asked and time.monotonic() - began > patience_s:
                asked = True
                url = f"{server}/v1/chat/completions/{chunk['id']}/end_thinking"
                try:
                    urllib.request.urlopen(urllib.request.Request(url, b"", method="POST")).close()
                except urllib.error.HTTPError as error:  # 404 and 409: it has ended in the meantime
                    print(f"\n[{error.code}]", file=sys.stderr)
    print()


if __name__ == "__main__":
    main()
