"""Proximal policy optimization, to compare with: a second model, the critic, guesses what a reply will earn.

The critic is of the policy's size, as in DeepSeek-R1's own comparison (2501.12948 v2, A.3): the same base once more,
with an adapter and a value head. Here for measuring; it cannot be resumed. Knows nothing of where episodes come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .basemodel import read_base
from .config import RunConfig
from .episodes import Episode
from .grpo import Run
from .learn import Learned, Learner, check_mismatch, padded
from .loss import LossSettings, Totals, correction, policy_loss
from .policy import Group, Policy, micro_batches, pack
from .update import clip_and_step, rate

_VALUE_WEIGHT = 0.5


def estimate(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, trace: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalized advantages and returns: (B,), (B, T), (B, T) -> (B, T), (B, T).

    The reward comes with a reply's last token. `trace` is GAE's lambda: 1 takes what was earned and subtracts the
    guess; less trusts the critic's later guesses more.
    """
    length = mask.shape[1]
    last = mask.sum(dim=1).long() - 1
    earned = torch.zeros_like(values).scatter_(1, last[:, None], rewards[:, None].to(values))
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(rewards).to(values)
    following = torch.zeros_like(running)
    for t in range(length - 1, -1, -1):
        error = earned[:, t] + discount * following - values[:, t]
        running = (error + discount * trace * running) * mask[:, t]
        advantages[:, t] = running
        following = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


@dataclass(slots=True)
class Critic:
    """A value for every token of a reply, before it is drawn."""

    policy: Policy  # the same base once more; its logits are never made
    head: nn.Linear
    optimizer: torch.optim.Optimizer

    def values(self, groups: list[Group]) -> Tensor:
        """(R, T), with gradient."""
        packed = pack(groups, self.policy.device)
        return packed.spread(self.head(self.policy.hidden(packed).float())[:, 0])


def make_critic(run: Run) -> Critic:
    """A critic beside a run's policy; it guesses 0 at first."""
    config, other = run.config, run.policy.base
    base = read_base(other.paths, other.dtype, config.model.weights)
    base.module.to(run.policy.device)
    policy = Policy(base, config.lora.rank, config.lora.alpha, config.seed + 1, config.model.checkpointing)
    module: Any = base.module
    head = nn.Linear(module.config.hidden_size, 1).to(run.policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    weights = [*policy.parameters(), *head.parameters()]
    return Critic(policy, head, torch.optim.AdamW(weights, lr=config.optimizer.lr, weight_decay=0.0, foreach=False))


@dataclass(slots=True)
class PpoLearner(Learner):
    """Learns from episodes with a critic in place of the group."""

    critic: Critic
    compares: ClassVar[bool] = False

    def learn(self, episodes: list[Episode], step: int) -> Learned:
        """One update of policy and critic."""
        config = self.config
        settings = LossSettings("dapo", epsilon_low=config.grpo.epsilon_low, epsilon_high=config.grpo.epsilon_high)
        groups = [Group(it.asking.ids, [reply.ids for reply in it.replies]) for it in episodes]
        tokens = sum(len(reply.ids) for it in episodes for reply in it.replies)
        totals = Totals(sum(len(it.replies) for it in episodes), tokens, config.grpo.max_tokens)
        batches = micro_batches(groups, config.grpo.token_budget)
        found = []
        with torch.no_grad():  # advantages are made even over the whole batch, so all guesses come first
            for indices in batches:
                batch = [groups[index] for index in indices]
                scores = self.policy.score(batch)
                rewards = torch.tensor([r for index in indices for r in episodes[index].rewards])
                better, returns = estimate(rewards.to(scores.logp), self.critic.values(batch), scores.mask)
                found.append((scores.logp, scores.mask, better, returns))
        seen = torch.cat([better[mask > 0] for _, mask, better, _ in found])
        mean, deviation = seen.mean(), seen.std() + 1e-8
        self.optimizer.zero_grad()
        self.critic.optimizer.zero_grad()
        total, kl, error = 0.0, 0.0, 0.0
        for indices, (old, mask, better, returns) in zip(batches, found, strict=True):
            batch = [groups[index] for index in indices]
            replies = [reply for index in indices for reply in episodes[index].replies]
            compared = correction(old, padded([reply.logprobs for reply in replies], old), mask, "none")
            kl += compared.raw.kl * float(mask.sum()) / tokens
            even = (better - mean) / deviation * mask
            loss = policy_loss(self.policy.score(batch).logp, old, even, mask, settings, totals=totals)
            loss.value.backward()
            missed = ((self.critic.values(batch) - returns).square() * mask).sum() / tokens
            (_VALUE_WEIGHT * missed).backward()
            total, error = total + float(loss.value.detach()), error + float(missed.detach())
        check_mismatch(kl, self.kl_stop, step)
        lr = rate(config.optimizer, step, config.grpo.steps)
        torch.nn.utils.clip_grad_norm_(self.critic.policy.parameters(), config.optimizer.clip, foreach=False)
        self.critic.optimizer.step()
        gradient = clip_and_step(self.policy, self.optimizer, config.optimizer, lr, total)
        return Learned(total, gradient, {"mismatch_kl": kl, "entropy": 1.0, "value_error": error})


def with_critic(run: Run) -> None:
    """Have a run learn by PPO instead."""
    it = run.learner
    run.learner = PpoLearner(it.config, it.policy, it.optimizer, it.exact, it.kl_stop, make_critic(run))


def measure(config: RunConfig, *, critic: bool, report: Callable[[str], None]) -> dict[str, float]:
    """Train one arm of the comparison in this process; what it took."""
    from .grpo import open_run

    run = open_run(config)
    try:
        if critic:
            with_critic(run)
        run.go(report)
    finally:
        run.close()
    records = [it for it in run.folder.records() if it["kind"] == "grpo" and "loss" in it]
    evaluations = [it for it in run.folder.records() if it["kind"] == "evaluation"]
    later = records[1:] or records  # the first step also loads and allocates
    return {
        "update_s": sum(it["update_s"] for it in later) / len(later),
        "rollout_s": sum(it["rollout_s"] for it in later) / len(later),
        "peak_gb": max(it["peak_gb"] for it in records),
        "before": evaluations[0]["pass_1"][0],
        "after": evaluations[-1]["pass_1"][0],
        "low": evaluations[-1]["pass_1"][1],
        "high": evaluations[-1]["pass_1"][2],
    }
