"""Replies to learn from: prompts through the engine, token ids in and out, the adapter swapped in after every step.

llama.cpp draws them, from a float copy of the weights where the model is small enough: there its distribution is the
trainer's up to rounding. Or PyTorch does, on the module that learns (`live.py`). Seeds belong to the step, the prompt
and the reply, so a run can be repeated and resumed. Knows nothing of rewards.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..backends import machine
from ..backends.base import Backend, GenerationRequest, LoadOptions, Sampling, Vocabulary
from ..backends.engine import Engine
from ..backends.open import open_backend
from ..r1.errors import UserError
from ..r1.gguf import read_header
from ..r1.hub import resolve
from ..r1.messages import Message
from ..r1.prompt import OPEN, ChatTemplate
from .config import RolloutConfig

Weights = Literal["f16", "bf16", "f32", "served", "live", "live bf16"]  # live: the trainer's own
_SMALL = 1_000_000_000  # parameters; a float copy of more costs memory that a small machine has not
_KL_STOP: dict[Weights, float] = {
    "f32": 1e-5,
    "f16": 1e-3,
    "bf16": 0.01,
    "served": 0.05,
    "live": 1e-5,
    "live bf16": 0.01,
}  # nats a token
_KINDS: dict[str, Literal["F32", "F16", "BF16"]] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_ADAPTER = "adapter.gguf"
_PROMPT_TOKENS = 512  # room where nobody knows the prompts


class Reply(NamedTuple):
    """One drawn reply."""

    ids: list[int]  # the end token included where the model ended by itself
    logprobs: list[float]  # natural, of the model's own distribution (temperature 1)
    text: str
    truncated: bool


class Asking(NamedTuple):
    """A rendered prompt."""

    ids: list[int]
    prefix: str  # what the template had opened of the reply: "<think>\n", or nothing


@dataclass(slots=True)
class Rollouts:
    """A model that replies: the engine, its vocabulary and its template."""

    engine: Engine
    template: ChatTemplate
    weights: Weights
    end_id: int  # ends a turn
    context: int
    folder: Path | None = None  # where adapters are handed over
    swap_s: float = field(default=0.0, init=False)  # that the last swap took
    _numbers: int = field(default=0, init=False)

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens."""
        return self.engine.backend.vocabulary

    @property
    def is_live(self) -> bool:
        """Whether the engine runs the module that is trained."""
        return self.weights.startswith("live")

    @property
    def kl_stop(self) -> float:
        """How far the engine may be from the trainer: with these weights no more than rounding explains."""
        return _KL_STOP[self.weights]

    def ask(self, messages: Sequence[Message]) -> Asking:
        """Render a conversation up to where the reply begins."""
        prompt = self.template.render(messages)
        opened = prompt.text.rfind(OPEN)
        prefix = prompt.text[opened:] if prompt.thinking == "open" and opened >= 0 else ""
        return Asking(prompt.encode(self.vocabulary.encode, self.vocabulary.bos_id), prefix)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        replies: int,
        max_tokens: int,
        seeds: Sequence[str],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[list[Reply]]:
        """Draw some replies to every prompt; prompt n with seed `seeds[n]`. Raises `UserError` for one too long."""
        room = self.context - max_tokens
        longest = max(map(len, prompts))
        if longest > room:
            raise UserError(
                f"a prompt has {longest} tokens, and {room} are set aside beside {max_tokens} for the reply",
                "raise rollout.prompt_tokens, or leave such prompts out",
            )
        requests: list[GenerationRequest] = []
        for prompt_ids, seed in zip(prompts, seeds, strict=True):
            for n in range(replies):
                sampling = Sampling(temperature=temperature, top_p=top_p, seed=_number(f"{seed} {n}"))
                self._numbers += 1
                name = str(self._numbers)
                requests.append(GenerationRequest(name, prompt_ids, max_tokens, sampling, top_logprobs=0))
        drawn: dict[str, Reply] = {request.id: Reply([], [], "", False) for request in requests}
        machine.release_helpers()
        for token in self.engine.generate(requests):
            reply = drawn[token.request_id]
            reply.ids.append(token.token_id)
            reply.logprobs.append(token.logprob if token.logprob is not None else float("nan"))
            drawn[token.request_id] = reply._replace(text=reply.text + token.text, truncated=token.finish == "length")
        self.engine.between_steps(lambda _: machine.release_helpers())
        everything = [drawn[request.id] for request in requests]
        return [everything[n : n + replies] for n in range(0, len(everything), replies)]

    def take(self, write: Any) -> None:
        """Have the engine use an adapter: `write(path)` writes it as GGUF. What was computed before is forgotten."""
        started = time.perf_counter()
        if self.is_live:  # it has it already

            def forget(backend: Any) -> None:
                backend.forget()

            self.engine.between_steps(forget)
        else:
            assert self.folder is not None
            path = self.folder / _ADAPTER
            write(path)
            self.use(path)
        self.swap_s = time.perf_counter() - started

    def use(self, path: Path | None) -> None:
        """Have the engine use an adapter's file, or none."""

        def swap(backend: Backend) -> None:
            setter = getattr(backend, "set_adapter", None)
            if setter is None:
                raise UserError(f"{backend.name} cannot change its adapter while it runs", "train on a GGUF file")
            setter(path)

        self.engine.between_steps(swap)

    def close(self) -> None:
        """Give the engine's memory back."""
        self.engine.close()


def open_rollouts(
    paths: tuple[Path, ...], config: RolloutConfig, max_tokens: int, folder: Path | None = None
) -> Rollouts:
    """Start the engine. A float copy of the weights, where one is wanted, is made in `folder` first."""
    header = read_header(paths[0])
    parameters = sum(read_header(path).parameters for path in paths)
    wanted = config.weights
    if wanted == "auto":
        wanted = "f16" if parameters <= _SMALL and folder is not None else "served"
    if wanted != "served" and folder is not None and header.quantization.lower() != wanted:
        from .basemodel import copy_model, fingerprint

        mark = fingerprint([read_header(path) for path in paths])
        copy = folder / f"rollout-{mark}-{wanted}.gguf"
        if not copy.exists():
            copy_model(paths, copy, _KINDS[wanted])
        paths = (copy,)
    context = min((config.prompt_tokens or _PROMPT_TOKENS) + max_tokens, header.context_length or 1 << 30)
    opened = open_backend(
        paths,
        LoadOptions(
            context=context,
            parallel=config.parallel,
            cache_tokens=config.parallel * (-(-context // 256) * 256),
            kv_type="f32" if wanted == "f32" else "f16",
            flash_attention=False if wanted == "f32" else None,
            threads=config.threads or None,
            stored_bytes=0,  # the next adapter makes them worthless
            steady=True,
        ),
    )
    vocabulary = opened.backend.vocabulary
    template = ChatTemplate(opened.chat_template, vocabulary.control, bos=opened.begin_text, eos=opened.end_text)
    end_id = end_of_turn(vocabulary, opened.end_text)
    return Rollouts(Engine(opened.backend), template, wanted, end_id, context, folder)


def end_of_turn(vocabulary: Vocabulary, end_text: str) -> int:
    """The token that ends a reply."""
    return vocabulary.control.get(end_text, next(iter(sorted(vocabulary.end_ids)), 0))


def remove_copies(folder: Path) -> None:
    """Delete the float copies that a run made for its engine."""
    for copy in folder.glob("rollout-*.gguf"):
        with suppress(OSError):
            copy.unlink()


def find_model(name: str) -> tuple[tuple[Path, ...], Path | None]:
    """A model's files, and the run whose adapter belongs to it where the name says `model+run`."""
    model, plus, run = name.partition("+")
    if plus and not Path(name).exists():
        folder = Path(run)
        if not (folder / _ADAPTER).is_file():
            raise UserError(f"there is no trained adapter in {run}", "name the folder of a run: demo+run1")
        return _files(model), folder
    return _files(name), None


def _files(name: str) -> tuple[Path, ...]:
    from ..r1.catalog import BASE_MODEL

    return resolve(BASE_MODEL if name == "demo" else name).paths


def _number(seed: str) -> int:
    """31 bits that depend on every character."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little") >> 1
