"""Rollouts on the module that is trained, through the PyTorch backend, and the choice between them and llama.cpp.

Nothing is copied: the adapter that learns is the one that replies, so there is nothing to hand over. Which engine is
faster depends on the machine; `auto` tries both on the run's own prompts. Knows nothing of rewards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends.engine import Engine
from ..backends.open import Words, open_module, open_vocabulary
from ..r1.errors import UserError
from ..r1.gguf import read_header
from ..r1.messages import Message
from ..r1.prompt import ChatTemplate
from .config import RolloutConfig
from .learn import padded
from .loss import correction
from .policy import Group, Policy
from .rollout import Rollouts, end_of_turn, open_rollouts

_COUNTED = 32  # prompts
_SPARE = 1.25  # times what they have: another may have fewer letters and more tokens
_TRIED = 2  # prompts
_TRIED_REPLIES = 16  # to all of them
_TRIED_TOKENS = 32  # a reply


class Trial(NamedTuple):
    """How an engine did."""

    engine: str
    tokens_s: float
    kl: float  # nats a token between it and the trainer
    limit: float  # more is too far

    def __str__(self) -> str:
        return f"{self.engine} {self.tokens_s:.0f} tokens/s, {self.kl:.1e} nats a token from the trainer"


def open_live(policy: Policy, config: RolloutConfig, max_tokens: int) -> Rollouts:
    """An engine over the policy's own module, with the adapter as it is at every moment."""
    paths = policy.base.paths
    header = read_header(paths[0])
    words = open_vocabulary(paths)
    assert config.prompt_tokens
    context = min(config.prompt_tokens + max_tokens, header.context_length or 1 << 30)
    opened = open_module(policy.base.module, words, context=context, parallel=config.parallel)
    template = template_of(words)
    end_id = end_of_turn(words.vocabulary, words.end_text)
    narrow = policy.base.dtype.itemsize < 4
    return Rollouts(Engine(opened.backend), template, "live bf16" if narrow else "live", end_id, context)


def template_of(words: Words) -> ChatTemplate:
    """The chat template of a vocabulary's file."""
    return ChatTemplate(words.chat_template, words.vocabulary.control, bos=words.begin_text, eos=words.end_text)


def room_for(paths: Sequence[Path], conversations: Sequence[Sequence[Message]]) -> int:
    """Tokens that the longest of some prompts has, and some to spare: only those with the most letters are counted."""
    words = open_vocabulary(paths)
    template = template_of(words)

    def letters(conversation: Sequence[Message]) -> int:
        return sum(len(str(message.content)) for message in conversation)

    vocabulary = words.vocabulary
    longest = sorted(conversations, key=letters)[-_COUNTED:]
    counts = (len(template.render(it).encode(vocabulary.encode, vocabulary.bos_id)) for it in longest)
    return math.ceil(max(counts) * _SPARE)


def open_fitting(
    policy: Policy,
    config: RolloutConfig,
    max_tokens: int,
    folder: Path,
    *,
    take: Callable[[Rollouts], None],
    prompts: Callable[[Rollouts], Sequence[Sequence[int]]],
    chosen: str,
    report: Callable[[str], None],
) -> Rollouts:
    """The engine that the configuration asks for; with `auto` the faster of those that keep to the trainer.

    `chosen` is what an earlier part of the same run found ("" = nothing yet): a resumed run keeps its engine.
    """

    def llama() -> Rollouts:
        return open_rollouts(policy.base.paths, config, max_tokens, folder)

    def live() -> Rollouts:
        return open_live(policy, config, max_tokens)

    engines = {"llama.cpp": llama, "pytorch": live}
    engine = chosen or config.engine
    if engine != "auto":
        return engines[engine]()
    trials: list[Trial] = []
    for name, open_one in engines.items():
        rollouts = open_one()
        try:
            take(rollouts)
            trials.append(_try(name, rollouts, policy, prompts(rollouts)[:_TRIED], min(_TRIED_TOKENS, max_tokens)))
        finally:
            rollouts.close()
        report(f"rollouts: {trials[-1]}")
    fitting = [trial for trial in trials if trial.kl <= trial.limit]
    if not fitting:
        raise UserError(
            "neither engine keeps to the trainer's distribution: " + "; ".join(map(str, trials)),
            "set rollout.weights or rollout.kl_stop",
        )
    return engines[max(fitting, key=lambda trial: trial.tokens_s).engine]()


def _try(name: str, rollouts: Rollouts, policy: Policy, prompts: Sequence[Sequence[int]], max_tokens: int) -> Trial:
    """Draw some replies, twice: the first time warms up."""
    replies = max(1, _TRIED_REPLIES // len(prompts))
    drawn, seconds = [], 0.0
    for turn in range(2):
        started = time.perf_counter()
        drawn = rollouts.draw(prompts, replies, max_tokens, [f"trial {turn} {n}" for n in range(len(prompts))])
        seconds = time.perf_counter() - started
    told = [reply for group in drawn for reply in group]
    groups = [
        Group(prompt_ids, [reply.ids for reply in group]) for prompt_ids, group in zip(prompts, drawn, strict=True)
    ]
    with torch.no_grad():
        scores = policy.score(groups)
    sampled = padded([reply.logprobs for reply in told], scores.logp)
    kl = correction(scores.logp, sampled, scores.mask, "none").raw.kl
    return Trial(name, sum(len(reply.ids) for reply in told) / seconds, kl, rollouts.kl_stop)
