"""The contract: what a backend is given, and what it gives back.

Only plain data and protocols live here; no runtime is imported. It knows nothing of HTTP, of chat roles, or of
`<think>`. A new backend fills `Vocabulary` and `Backend` and passes `tests/test_backend_contract.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..r1.errors import UserError

FinishReason = Literal["stop", "length"]


class PromptTooLong(UserError):
    """A prompt that leaves no room in the context for a single token of reply."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens; this model reads at most {limit} (prompt and reply together)",
            "shorten the conversation, or serve with a larger --context",
        )
        self.tokens = tokens
        self.limit = limit


class BackendFailed(UserError):
    """A step failed (out of memory, logits that are no numbers): its requests are lost, the engine is not."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; the defaults draw from the model's own distribution.

    `backends/sampling.py` is the written reference for the order and the meaning of every field.
    """

    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # on prompt and reply, 1 = off
    presence_penalty: float = 0.0  # on the reply only
    frequency_penalty: float = 0.0  # on the reply only
    penalty_last_n: int = 1024  # tokens that the penalties look back
    dry_multiplier: float = 0.0  # 0 = off
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 1024
    xtc_probability: float = 0.0  # 0 = off
    xtc_threshold: float = 0.1
    seed: int | None = None  # None = a new one every time
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)


@dataclass(frozen=True, slots=True)
class Force:
    """A wish: these tokens come next, whatever the model thinks."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Only:
    """A wish: the next token is one of these. `bits` is uint32, ceil(vocabulary / 32), lowest bit first."""

    bits: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Forget:
    """A wish: penalties no longer count what the reply has said so far. The steer is asked again at once."""


Wish = Force | Only | Forget | None
"""What a steer asks for before a token is drawn; `None` leaves the model free."""


Seen = tuple[Any, FinishReason | None]
"""What a steer makes of a token: a note for the request's caller, and the reason to end the reply here, if any."""


class Steer(Protocol):
    """Looks over one request's shoulder, in the engine's thread; the backend obeys and knows nothing of its reasons."""

    def wish(self, logits: Callable[[], NDArray[np.float32]]) -> Wish:
        """Say what the next token may be. `logits()` gives the model's own, (vocabulary,), and costs a copy."""
        ...

    def see(self, token_id: int, text: str, finish: FinishReason | None) -> Seen:
        """Take note of a token and of the backend's reason to end with it, and decide whether to end.

        Where the model ended by itself (`finish == "stop"`) and the answer is `finish=None`, the end token is forgotten
        and the steer is asked for its wish again. `"length"` cannot be overruled.
        """
        ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, one reply. `n` replies are `n` requests with the same prompt; backends share its KV cache."""

    id: str
    prompt_ids: Sequence[int]
    max_tokens: int  # 0 = read the prompt into the KV cache and finish
    sampling: Sampling = field(default_factory=Sampling)
    top_logprobs: int | None = None  # None = no log-probabilities at all; 0 = of the drawn token only
    ignore_eos: bool = False
    steer: Steer | None = None
    idle: bool = False  # work for when nothing else is to do; anything else goes first


class Started(NamedTuple):
    """What a request's prompt cost; told once, with its first token."""

    cached_tokens: int  # of the prompt, found in the KV cache
    queue_s: float  # from `add` to the first decoded chunk
    prefill_s: float  # from there to the first token


class Token(NamedTuple):
    """One token of one reply."""

    request_id: str
    token_id: int  # -1 where a request with max_tokens=0 finishes
    text: str  # "" while a character is still spread over several tokens, and for end-of-generation tokens
    finish: FinishReason | None = None
    note: Any = None  # what the request's steer said of it
    logprob: float | None = None  # natural log, the model's own distribution (before temperature); None if forced
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, natural log), likeliest first
    started: Started | None = None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a user may choose when a model is loaded; `None` leaves the choice to the backend."""

    context: int | None = None  # tokens a request may have, prompt and reply together
    parallel: int = 4  # replies in progress at once; more wait
    cache_tokens: int | None = None  # KV cache of all requests together
    kv_type: str = "f16"  # f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl
    threads: int | None = None
    gpu_layers: int | None = None
    flash_attention: bool | None = None
    batch_tokens: int = 512  # a step decodes at most so many
    mmap: bool = True
    loras: tuple[tuple[Path, float], ...] = ()  # adapter files (or folders, or a run's) and their scales
    backend: str = "auto"  # auto, llama.cpp, pytorch, mlx
    dtype: str = "auto"  # what PyTorch computes in: auto, f32, bf16, f16
    trust_remote_code: bool = False  # run Python files that come with a checkpoint
    allow_pickle: bool = False  # load weights from files that can hold programs (PyTorch's .bin)
    stored_bytes: int | None = None  # of prefixes in RAM behind the KV cache; None = by what is free
    steady: bool = False  # how prompts are cut does not depend on the machine's speed: the same bits every time


class Load(NamedTuple):
    """How busy a backend is."""

    running: int
    waiting: int
    cache_used: int  # tokens in the KV cache, running and retained
    cache_size: int


class Vocabulary(Protocol):
    """A model's tokens. Unlike its backend it may be used from any thread.

    `bos_id` is the begin-of-sequence token where the model wants its prompts to begin with one; any of `end_ids` ends a
    reply; `control` has every token that is not plain text by its text: `<|im_start|>`, `</think>`.
    """

    @property
    def size(self) -> int:
        """Tokens in it."""
        ...

    @property
    def bos_id(self) -> int | None: ...  # noqa: D102

    @property
    def end_ids(self) -> frozenset[int]: ...  # noqa: D102

    @property
    def control(self) -> dict[str, int]: ...  # noqa: D102

    def boundary_texts(self) -> tuple[str, str]:
        """The begin- and end-of-sequence tokens as chat templates write them, "" where there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which control tokens count as such; nothing is put in front."""
        ...

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token; not always whole characters."""
        ...

    def shown(self, token_id: int) -> bytes:
        """The bytes of one token as a reader sees them: none for a control token such as `<|im_end|>`."""
        ...


class Backend(Protocol):
    """A loaded model. Not thread-safe: `Engine` is the one thread that calls it."""

    name: str  # of the runtime: "llama.cpp"
    context_length: int  # tokens, prompt and reply together

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens."""
        ...

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `PromptTooLong` (and leaves nothing behind) where it can never fit."""
        ...

    def step(self) -> list[Token]:
        """Take every running request one step further, waiting ones into free places; in the order they came."""
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request; it gives no token after this. Unknown ids are ignored."""
        ...

    def load(self) -> Load:
        """How busy it is now. The one method that other threads may call."""
        ...

    def close(self) -> None:
        """Give everything back. Nothing may be called after it."""
        ...
