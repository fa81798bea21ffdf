"""The official OpenAI client: one reply whole, one streamed. Thoughts are in `reasoning_content`.

python examples/openai_client.py [http://127.0.0.1:8000]
"""

import sys

from openai import OpenAI


def main() -> None:
    server = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{server}/v1", api_key="none")  # a server with keys wants one of them here
    model = client.models.list().data[0].id

    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Name three colours."}], max_tokens=200, seed=1
    )
    choice = reply.choices[0]
    print("thoughts:", getattr(choice.message, "reasoning_content", None))
    print("answer:  ", choice.message.content)
    print("ended by:", choice.finish_reason, "-", reply.usage)

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Count to five."}],
        max_tokens=200,
        stream=True,
        extra_body={"thinking_budget": 100},  # fields that OpenAI does not have go in here
    )
    for chunk in stream:
        if chunk.choices:
            delta = chunk.choices[0].delta
            print(getattr(delta, "reasoning_content", None) or delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
