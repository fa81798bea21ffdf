"""One step of learning from episodes: forward passes, the comparison with the engine, loss, gradient, optimizer.

Knows nothing of where episodes come from, of files, or of when to stop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..r1.errors import UserError
from .config import RunConfig
from .episodes import Episode
from .loss import Correction, LossSettings, Totals, correction, effective_share, kl_terms, policy_loss
from .policy import Group, Policy, micro_batches
from .rollout import Reply
from .update import clip_and_step, give_back_memory, rate


class Learned(NamedTuple):
    """What an optimizer step was like."""

    loss: float
    gradient: float  # norm, before clipping
    metrics: dict[str, float]


@dataclass(slots=True)
class Learner:
    """A policy and its optimizer."""

    config: RunConfig
    policy: Policy
    optimizer: torch.optim.Optimizer
    exact: bool  # the engine computes with the trainer's own weights
    kl_stop: float  # nats a token between engine and trainer
    compares: ClassVar[bool] = True  # replies with the others of their group: one whose replies are equal is no use

    def learn(self, episodes: list[Episode], step: int) -> Learned:
        """One or more optimizer steps on a batch of episodes."""
        grpo = self.config.grpo
        settings = self._loss_settings()
        # Without a KL a group of equal rewards has no gradient: it counts in the totals and needs no forward pass.
        needed = [it for it in episodes if it.teaches or settings.beta or self.config.guard.kl]
        needed = [piece for it in needed for piece in it.pieces(grpo.token_budget)]
        groups = [Group(it.asking.ids, [reply.ids for reply in it.replies]) for it in needed]
        learned_tokens = sum(len(reply.ids) for it in episodes for reply in it.replies if self._counts(reply))
        totals = Totals(sum(len(it.replies) for it in episodes), learned_tokens, grpo.max_tokens)
        olds: dict[int, Tensor] = {}
        lr = rate(self.config.optimizer, step, grpo.steps)
        sums, gradient = _Sums(), 0.0
        for _ in range(grpo.updates):
            self.optimizer.zero_grad()
            sums = _Sums()
            for n, indices in enumerate(micro_batches(groups, grpo.token_budget)):
                batch = [needed[index] for index in indices]
                old = self._backward([groups[index] for index in indices], batch, settings, totals, olds.get(n), sums)
                olds[n] = old
            check_mismatch(sums.kl, self.kl_stop, step)
            gradient = clip_and_step(self.policy, self.optimizer, self.config.optimizer, lr, sums.loss)
        give_back_memory()
        return Learned(sums.loss, gradient, sums.metrics())

    def _backward(
        self,
        groups: list[Group],
        batch: list[Episode],
        settings: LossSettings,
        totals: Totals,
        old: Tensor | None,
        sums: _Sums,
    ) -> Tensor:
        """The gradient of one micro-batch; the log-probabilities at the start of the step."""
        temperature = self.config.rollout.temperature
        scores = self.policy.score(groups, temperature)
        if old is None:
            old = scores.logp.detach()
        device = scores.logp.device
        replies = [reply for episode in batch for reply in episode.replies]
        sampled = padded([reply.logprobs for reply in replies], old)
        mask = scores.mask * torch.tensor([[float(self._counts(reply))] for reply in replies], device=device)
        advantage = torch.tensor([a for episode in batch for a in episode.advantages], device=device).to(old.dtype)
        if temperature == 1.0:
            bounds = settings.correction_cap, settings.correction_floor
            compared = correction(old, sampled, scores.mask, settings.correction, *bounds)
        else:  # the engine's log-probabilities are of temperature 1
            with torch.no_grad():
                plain = self.policy.score(groups).logp
            compared = correction(plain, sampled, scores.mask, "none")
        ref = None
        if settings.beta or self.config.guard.kl:
            with self.policy.reference(), torch.no_grad():
                ref = self.policy.score(groups, temperature).logp
        weights = None if settings.correction == "none" else compared.weights
        loss = policy_loss(
            scores.logp, old, advantage, mask, settings, ref=ref, sampled=sampled, weights=weights, totals=totals
        )
        loss.value.backward()
        metrics = dict(loss.metrics)
        metrics["entropy"] = float((scores.entropy * scores.mask).sum() / scores.mask.sum())
        if ref is not None:
            metrics["kl_base"] = float((kl_terms(old, ref) * scores.mask).sum() / scores.mask.sum())
        sums.add(float(loss.value.detach()), metrics, compared, float(scores.mask.sum()))
        return old

    def _counts(self, reply: Reply) -> bool:
        return not (reply.truncated and self.config.grpo.truncated == "mask")

    def _loss_settings(self) -> LossSettings:
        grpo, rollout = self.config.grpo, self.config.rollout
        mode = rollout.correction
        if mode == "auto":  # where the engine computes with the trainer's own weights there is nothing to correct
            exact = self.exact or rollout.temperature != 1.0
            mode = "none" if exact else "token_truncate"
        return LossSettings(
            name=grpo.loss,  # pyright: ignore[reportArgumentType] - checked when it was read
            epsilon_low=grpo.epsilon_low,
            epsilon_high=grpo.epsilon_high,
            dual_clip=grpo.dual_clip or None,
            beta=grpo.beta,
            kl=grpo.kl,
            correction=mode,
            correction_cap=rollout.cap,
            correction_floor=rollout.floor,
        )


def check_mismatch(kl: float, limit: float, step: int) -> None:
    """The canary: an engine that has another adapter, or none, does not say what the trainer says."""
    if not kl <= limit:  # NaN, too
        raise UserError(
            f"at step {step} the engine's replies are {kl:.2g} nats a token from the trainer's distribution, more than "
            f"{limit:g}: it may have an old adapter",
            "resume from the last checkpoint; if it stays so, set rollout.weights or rollout.kl_stop",
        )


@dataclass(slots=True)
class _Sums:
    """What the micro-batches of a step add up to."""

    loss: float = 0.0
    tokens: float = 0.0
    weighted: dict[str, float] = field(default_factory=dict)
    raw: list[Tensor] = field(default_factory=list)
    applied: list[Tensor] = field(default_factory=list)

    def add(self, loss: float, metrics: dict[str, float], compared: Correction, tokens: float) -> None:
        metrics |= {"mismatch_kl": compared.raw.kl, "mismatch_kl_applied": compared.applied.kl}
        self.loss += loss
        self.tokens += tokens
        for name, value in metrics.items():
            self.weighted[name] = self.weighted.get(name, 0.0) + value * tokens
        self.raw.append(compared.raw_replies)
        self.applied.append(compared.applied_replies)

    @property
    def kl(self) -> float:
        return self.weighted["mismatch_kl"] / self.tokens

    def metrics(self) -> dict[str, float]:
        means = {name: value / self.tokens for name, value in self.weighted.items()}
        raw, applied = torch.cat(self.raw), torch.cat(self.applied)
        return means | {
            "mismatch_ess": effective_share(raw),
            "mismatch_ess_applied": effective_share(applied),
            "mismatch_largest": float(raw.max()),
        }


def padded(rows: list[list[float]], like: Tensor) -> Tensor:
    """(B,) lists -> (B, T), 0 behind their ends."""
    padded = torch.zeros_like(like)
    for n, row in enumerate(rows):
        padded[n, : len(row)] = torch.tensor(row, dtype=like.dtype)
    return padded
