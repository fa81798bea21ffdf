"""The smallest backend: no model, a byte a token, and a reply that follows a script. Tests and the tutorial use it.

What a user says comes back, thoughts first where the prompt ends inside `<think>`. A paragraph of it that begins with
`script:` is, with all that follows, the reply itself, control tokens and all, so that a client can be tried against any
output a model might give: `script:I think</think>\\n\\nfour<|end|>`.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Force, Forget, GenerationRequest, Load, Only, Token
from .draft import Draft
from .sampling import distribution, log_softmax, mask_to, seed32

Script = Callable[[Sequence[int]], Sequence[int]]
"""Prompt ids -> the ids that the model wants to say; it ends where they end."""

_SURE = 12.0  # logit of the scripted token above all others


class EchoVocabulary:
    """256 bytes and R1's control tokens."""

    def __init__(self) -> None:
        names = ("<|begin|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
        self.control = {name: 256 + i for i, name in enumerate(names)}
        self.size = 256 + len(names)
        self.bos_id: int | None = self.control["<|begin|>"]
        self.end_ids = frozenset({self.control["<|end|>"]})
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._names = {token_id: name.encode() for name, token_id in self.control.items()}

    def boundary_texts(self) -> tuple[str, str]:
        """The texts of the tokens that begin and end a sequence."""
        return "<|begin|>", "<|end|>"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`: control tokens where they stand, bytes for the rest."""
        ids: list[int] = []
        for part in self._split.split(text):
            ids.extend([self.control[part]] if part in self.control else part.encode())
        return ids

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token."""
        return self._names.get(token_id) or bytes([token_id])

    def shown(self, token_id: int) -> bytes:
        """The bytes of one token as a reader sees them; like R1's, the thinking tags are no secret."""
        name = self._names.get(token_id)
        if name is None:
            return bytes([token_id])
        return name if name in (b"<think>", b"</think>") else b""


class Echo:
    """Says what its script says, one byte a step, as any backend would: with sampling, steers and log-probabilities."""

    name = "echo"

    def __init__(
        self, script: Script | None = None, *, context_length: int = 4096, parallel: int = 4, step_s: float = 0.0
    ) -> None:
        self.vocabulary = EchoVocabulary()
        self.context_length = context_length
        self._script = script or self._echo
        self._parallel = parallel
        self._step_s = step_s
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `PromptTooLong`."""
        draft = Draft(request, self.vocabulary, self.context_length)
        self._waiting.append(_Running(draft, deque(self._script(request.prompt_ids))))

    def step(self) -> list[Token]:
        """One token for every running request."""
        while self._waiting and len(self._running) < self._parallel:
            reply = self._waiting.popleft()
            reply.draft.start(0)
            self._running.append(reply)
        if self._step_s:
            time.sleep(self._step_s)
        tokens = [token for reply in self._running for token in self._next(reply)]
        ended = {token.request_id for token in tokens if token.finish}
        self._running = [reply for reply in self._running if reply.draft.request.id not in ended]
        return tokens

    def cancel(self, request_id: str) -> None:
        """Forget a request."""
        self._running = [reply for reply in self._running if reply.draft.request.id != request_id]
        self._waiting = deque(reply for reply in self._waiting if reply.draft.request.id != request_id)

    def load(self) -> Load:
        """How busy it is now; each running request counts as one token of cache."""
        return Load(len(self._running), len(self._waiting), len(self._running), self._parallel)

    def close(self) -> None:
        """Forget everything."""
        self._running, self._waiting = [], deque()

    def _next(self, reply: _Running) -> list[Token]:
        draft = reply.draft
        if draft.request.max_tokens == 0:
            return [draft.read()]
        while True:
            logits = self._logits(reply)
            wish = draft.wish(logits.copy)
            if isinstance(wish, Force):
                forced = draft.force(wish.token_ids)
                reply.said.extend(token.token_id for token in forced)
                if forced:
                    return forced
                continue
            if isinstance(wish, Forget):
                reply.forgotten = len(reply.said)
                continue
            logprobs = None if draft.request.top_logprobs is None else log_softmax(logits)
            if isinstance(wish, Only):
                mask_to(logits, wish.bits)
            token_id = reply.draw(logits)
            if reply.plan and token_id == reply.plan[0]:
                reply.plan.popleft()
            token = draft.take(token_id, logprobs)
            if token:
                reply.said.append(token_id)
                return [token]

    def _logits(self, reply: _Running) -> NDArray[np.float32]:
        logits = np.zeros(self.vocabulary.size, np.float32)
        logits[ord(".")] = 1.0  # what it says where its script is forbidden
        logits[list(b" \t\n\r")] = -_SURE  # and what it does not, while a mask allows more
        logits[reply.plan[0] if reply.plan else min(self.vocabulary.end_ids)] = _SURE
        if reply.draft.request.ignore_eos:
            logits[list(self.vocabulary.end_ids)] = -np.inf
        return logits

    def _echo(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        control = self.vocabulary.control
        start = _last(prompt_ids, control["<｜User｜>"]) + 1
        end = _last(prompt_ids, control["<｜Assistant｜>"])
        asked = bytes(i for i in prompt_ids[start : end if end >= start else None] if i < 256)
        text = asked.decode(errors="replace")
        _, is_script, script = f"\n\n{text}".partition("\n\nscript:")
        if is_script:
            return self.vocabulary.encode(script)
        thinking = _last(prompt_ids, control["<think>"]) > _last(prompt_ids, control["</think>"])
        thought = "I am to say this again." if thinking else ""
        return self.vocabulary.encode(thought + ("</think>\n\n" if thinking else "")) + list(text.encode())


class _Running:
    """A reply in progress."""

    def __init__(self, draft: Draft, plan: deque[int]) -> None:
        self.draft = draft
        self.plan = plan  # what the script still wants to say
        self.said: list[int] = []
        self.forgotten = 0  # tokens at the start of `said` that penalties don't count
        self._random = np.random.default_rng(seed32(draft.request.sampling.seed))

    def draw(self, logits: NDArray[np.float32]) -> int:
        request = self.draft.request
        chances = distribution(
            logits.astype(np.float64), request.sampling, request.prompt_ids, self.said[self.forgotten :]
        )
        return int(self._random.choice(chances.size, p=chances))


def _last(token_ids: Sequence[int], token_id: int) -> int:
    return max((i for i, other in enumerate(token_ids) if other == token_id), default=-1)
