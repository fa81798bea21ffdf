"""How much of a step is Python: everything outside llama.cpp, with the state machine of real requests in the loop.

usage: python benchmarks/step.py MODEL.gguf [--streams 16] [--tokens 128] [--threads N] [--rounds 3]

Time inside llama.cpp's functions is llama.cpp's; the rest of the engine's loop is ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import llama_cpp

from stillhouse.backends.base import Force, GenerationRequest, LoadOptions, Only, Sampling
from stillhouse.backends.engine import Engine
from stillhouse.backends.open import open_backend
from stillhouse.r1.thinking import Rules, Tags, Thinking

LLAMA_CPP = [  # what takes more than a microsecond, in the order of a request's life
    "llama_sampler_chain_init",
    "llama_state_seq_get_size",
    "llama_state_seq_get_data",
    "llama_state_seq_set_data",
    "llama_memory_seq_rm",
    "llama_memory_seq_cp",
    "llama_decode",
    "llama_sampler_sample",
    "llama_sampler_apply",
    "llama_sampler_accept",
    "llama_sampler_free",
]


class Clock:
    """Adds up the time spent in llama.cpp."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in LLAMA_CPP:  # the backend's files call them as attributes of the package
            setattr(llama_cpp, name, self._timed(getattr(llama_cpp, name)))

    def _timed(self, function):
        def timed(*arguments):
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    opened = open_backend((arguments.model,), LoadOptions(parallel=arguments.streams, threads=arguments.threads))
    vocabulary = opened.backend.vocabulary
    tags = Tags.of(vocabulary.control, vocabulary.end_ids, vocabulary.size, vocabulary.encode)
    clock = Clock()
    engine = Engine(opened.backend)
    shares, step_ms = [], []
    for turn in range(arguments.rounds + 1):
        requests = [
            GenerationRequest(
                f"{turn}-{i}",
                vocabulary.encode(f"Round {turn}, story {i}: once upon a time there was a"),
                arguments.tokens,
                Sampling(temperature=0.6, top_p=0.95, seed=i),
                ignore_eos=True,
                steer=Thinking(tags, Rules(), arguments.tokens, "undecided", force=Force, only=Only),
            )
            for i in range(arguments.streams)
        ]
        in_c, steps, spent = clock.seconds, engine.activity.steps, engine.activity.step_s
        for _ in engine.generate(requests):
            pass
        in_c, steps, spent = clock.seconds - in_c, engine.activity.steps - steps, engine.activity.step_s - spent
        if turn:  # the first warms up
            shares.append(1 - in_c / spent)
            step_ms.append(spent / steps * 1000)
    engine.close()
    print(
        f"{arguments.streams} streams: {statistics.median(step_ms):.1f} ms a step, "
        f"of which Python {statistics.median(shares):.1%} (rounds: {', '.join(f'{s:.1%}' for s in shares)})"
    )


if __name__ == "__main__":
    main()
