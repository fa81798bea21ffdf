"""A model without a server: find it, load it, and take the tokens of several replies as they come.

python examples/in_process.py [MODEL]      default: the embedded small model
"""

import sys

from stillhouse.backends.base import GenerationRequest, LoadOptions, Sampling
from stillhouse.backends.engine import Engine
from stillhouse.backends.open import open_backend
from stillhouse.r1.hub import resolve
from stillhouse.r1.messages import Message
from stillhouse.r1.prompt import ChatTemplate


def main() -> None:
    files = resolve(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m")
    opened = open_backend(files.paths, LoadOptions(context=2048, parallel=2))
    vocabulary = opened.backend.vocabulary
    template = ChatTemplate(opened.chat_template, vocabulary.control, bos=opened.begin_text, eos=opened.end_text)
    engine = Engine(opened.backend)
    try:
        requests = []
        for number, question in enumerate(("Name a colour.", "Name an animal.")):
            prompt = template.render([Message("user", question)])
            ids = prompt.encode(vocabulary.encode, vocabulary.bos_id)
            requests.append(
                GenerationRequest(
                    str(number), ids, max_tokens=64, sampling=Sampling(temperature=0.6, top_p=0.95, seed=1)
                )
            )
        texts = {request.id: "" for request in requests}
        for token in engine.generate(requests):
            texts[token.request_id] += token.text
        for text in texts.values():
            print(text.strip(), end="\n\n")
    finally:
        engine.close()


if __name__ == "__main__":
    main()
