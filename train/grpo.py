"""Group relative policy optimization: draw replies, reward them, learn from what was better than its group, repeat.

A step: the adapter into the engine -> prompts -> replies -> rewards -> groups that teach nothing are left out and
others asked -> one forward pass over shared prompts -> loss -> optimizer -> log. Everything random depends on the run's
seed and the step alone, so a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..r1.errors import UserError
from .basemodel import read_base
from .checkpoint import RunFolder, adapter_of, start_from
from .config import RunConfig
from .episodes import Episode, completions, describe, line
from .evaluate import Evaluation, evaluate
from .export import save_gguf
from .loss import Correction, LossSettings, Totals, advantages, correction, effective_share, kl_terms, policy_loss
from .policy import Group, Policy, micro_batches
from .rewards import Asked, Rewards, Scored
from .rollout import Asking, Reply, Rollouts, find_model, open_rollouts, remove_copies
from .tasks import Item, Task, messages, open_task
from .update import clip_and_step, make_optimizer, peak_memory, place, rate

Report = Callable[[str], None]
_USELESS_STEPS = 5  # in a row, after which a run stops
_CUT_STEPS = 3
_ROLLBACKS = 3


@dataclass(slots=True)
class State:
    """What a run knows besides its weights; saved with them."""

    step: int = 0
    cursor: int = 0  # items asked so far
    best: float = -1.0  # held-out accuracy
    first_length: float = 0.0  # tokens a reply, at the first step
    strikes: int = 0  # steps in a row that a guard disliked
    rollbacks: int = 0
    useless: int = 0  # steps in a row without a group that teaches
    cut: int = 0  # steps in a row with nearly all replies cut off
    solved: dict[str, float] = field(default_factory=dict)  # item id -> running accuracy


class Learned(NamedTuple):
    """What an optimizer step was like."""

    loss: float
    gradient: float  # norm, before clipping
    metrics: dict[str, float]


def run_grpo(config: RunConfig, *, resume: bool = False, anyway: bool = False, report: Report = print) -> Run:
    """Train, or go on training, in the run's folder. Raises `UserError`; what is saved stays good."""
    run = open_run(config, resume=resume)
    try:
        if run.state.step == 0 and not anyway:
            refuse_hopeless(run, report)
        run.go(report)
    finally:
        run.close()
    return run


def open_run(config: RunConfig, *, resume: bool = False) -> Run:
    """Load everything that a run needs."""
    rewards = Rewards(config.rewards, config.gates)  # what is cheap to get wrong comes first
    paths, _ = find_model(config.model.name)
    task = open_task(config.task)
    folder = RunFolder(Path(config.out))
    folder.begin(config, resume=resume)
    device, dtype = place(config.model)
    base = read_base(paths, dtype)
    base.module.to(device)
    policy = Policy(base, config.lora.rank, config.lora.alpha, config.seed, config.model.checkpointing)
    optimizer = make_optimizer(policy, config.optimizer)
    state = State()
    if config.lora.start:
        start_from(policy, config.lora.start)
    restored = folder.restore(policy, optimizer) if resume else None
    if restored:
        state = State(**restored.state)
    folder.forget_after(restored.step if restored else -1)
    rollouts = open_rollouts(paths, config.rollout, config.grpo.max_tokens, folder.path)
    return Run(config, folder, task, policy, optimizer, rollouts, rewards, state)


def refuse_hopeless(run: Run, report: Report) -> None:
    """Try the task before training on it; raise `UserError` where there is nothing to learn from."""
    from .probe import probe

    verdict = probe(run, report)
    if verdict.hopeless:
        raise UserError(f"this will not learn: {verdict.words}", "--anyway trains nevertheless")


@dataclass(slots=True)
class Run:
    """A run that is loaded."""

    config: RunConfig
    folder: RunFolder
    task: Task
    policy: Policy
    optimizer: torch.optim.Optimizer
    rollouts: Rollouts
    rewards: Rewards
    state: State

    def go(self, report: Report = print) -> None:
        """Take the steps that are left."""
        every, last = self.config.evaluation.every, self.config.grpo.steps
        if self.state.step == 0:
            self.measure(report)
        while self.state.step < last:
            record = self.step()
            self.folder.log(record)
            report(line(record, last))
            self._watch(record, report)
            best = False
            if self.state.step == last or (every and self.state.step % every == 0):
                best = self.measure(report)
            if best or self.state.step == last or self.state.step % self.config.save.every == 0:
                self.save(best=best)

    def step(self) -> dict[str, Any]:
        """Draw, reward, learn; what is worth logging."""
        self.state.step += 1
        self.hand_over()
        started = time.perf_counter()
        episodes, asked = self._collect()
        drawn_at = time.perf_counter()
        useful = [episode for episode in episodes if episode.teaches]
        record: dict[str, Any] = {"step": self.state.step, "kind": "grpo"}
        record |= describe(asked)
        record["useful"] = sum(episode.teaches for episode in asked) / len(asked)
        if useful:
            self.state.useless = 0
            learned = self._learn(episodes)
            record |= {"loss": learned.loss, "gradient": learned.gradient, **learned.metrics}
            record["lr"] = rate(self.config.optimizer, self.state.step, self.config.grpo.steps)
        else:
            self.state.useless += 1
        ended = time.perf_counter()
        record |= {
            "change": self.policy.change(),
            "rollout_s": drawn_at - started,
            "update_s": ended - drawn_at,
            "swap_s": self.rollouts.swap_s,
            "peak_gb": peak_memory() / 1e9,
        }
        self.folder.keep(completions(self.state.step, asked))
        return record

    def measure(self, report: Report) -> bool:
        """Evaluate on held-out items; whether it is the best so far."""
        evaluation = self.evaluate(self.config.evaluation.items)
        summary = evaluation.summary()
        self.folder.log({"step": self.state.step, "kind": "evaluation", **summary})
        report(
            f"step {self.state.step}  held out: pass@1 {evaluation.pass_1}  format {evaluation.format:.2f}  "
            f"cut off {evaluation.truncated:.2f}  tokens {evaluation.tokens:.0f}"
        )
        best = evaluation.pass_1.value > self.state.best
        if best:
            self.state.best = evaluation.pass_1.value
        return best and self.state.step > 0

    def evaluate(self, items: int) -> Evaluation:
        """The policy as it is, on held-out items."""
        settings = self.config.evaluation
        self.hand_over()
        return evaluate(
            self.rollouts,
            self.task.held_out[:items],
            self.config.task,
            samples=settings.samples,
            max_tokens=self.config.grpo.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=f"{self.config.seed} evaluation",
        )

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint."""
        state = dataclasses.asdict(self.state)
        self.folder.save(self.state.step, self.policy, self.optimizer, state, keep=self.config.save.keep, best=best)

    def close(self) -> None:
        """Give the engine back and remove its copy of the weights."""
        self.rollouts.close()
        remove_copies(self.folder.path)

    # Rollouts

    def hand_over(self) -> None:
        """The adapter as it is now into the engine, which forgets what it computed with the old one."""
        self.rollouts.take(lambda path: save_gguf(adapter_of(self.policy), path))

    def _collect(self) -> tuple[list[Episode], list[Episode]]:
        """Episodes to learn from, and all that were asked."""
        grpo = self.config.grpo
        kept: list[Episode] = []
        asked: list[Episode] = []
        for turn in range(1 + (grpo.refills if grpo.dynamic_sampling else 0)):
            items = self._next_items(grpo.prompts - len(kept))
            episodes = self.episodes(items, f"{self.config.seed} {self.state.step} {turn}")
            asked += episodes
            kept += [it for it in episodes if it.teaches or not grpo.dynamic_sampling]
            if len(kept) >= grpo.prompts:
                break
        for episode in asked:
            right = sum((part.get("accuracy") or 0.0) >= 1.0 for part in episode.parts) / len(episode.parts)
            old = self.state.solved.get(episode.item.id, right)
            self.state.solved[episode.item.id] = (old + right) / 2
        return kept, asked

    def episodes(self, items: list[Item], seed: str) -> list[Episode]:
        """Draw a group for each item and reward it."""
        grpo = self.config.grpo
        asking = [self.rollouts.ask(messages(item, self.config.task)) for item in items]
        drawn = self.rollouts.draw(
            [it.ids for it in asking],
            grpo.group,
            grpo.max_tokens,
            [f"{seed} {n} {item.id}" for n, item in enumerate(items)],
            temperature=self.config.rollout.temperature,
        )
        scored = self._score(items, asking, drawn)
        totals = torch.tensor(scored.total, dtype=torch.float64).view(len(items), grpo.group)
        if grpo.truncated == "penalise":
            cut = torch.tensor([[reply.truncated for reply in replies] for replies in drawn])
            totals = totals - cut.double()
        better = advantages(totals, grpo.normalisation)
        better = torch.where(totals.std(dim=1, keepdim=True) > 1e-9, better, torch.zeros_like(better))
        return [
            Episode(
                item,
                asking[n],
                drawn[n],
                totals[n].tolist(),
                [{name: values[at] for name, values in scored.parts.items()} for at in _places(n, grpo.group)],
                better[n].tolist(),
            )
            for n, item in enumerate(items)
        ]

    def _score(self, items: list[Item], asking: list[Asking], drawn: list[list[Reply]]) -> Scored:
        group = self.config.grpo.group
        return self.rewards(
            Asked(
                [item.prompt for item in items for _ in range(group)],
                [reply.text for replies in drawn for reply in replies],
                [reply.ids for replies in drawn for reply in replies],
                [item.columns for item in items for _ in range(group)],
                [item.id for item in items for _ in range(group)],
                [it.prefix for it in asking for _ in range(group)],
                [reply.truncated for replies in drawn for reply in replies],
                self.config.grpo.max_tokens,
            )
        )

    def _next_items(self, count: int) -> list[Item]:
        """The next items in the run's own order, each epoch another one; with a curriculum, rather the useful ones."""
        items = self.task.train
        chosen: list[Item] = []
        for _ in range(count * 20):
            epoch, place_in = divmod(self.state.cursor, len(items))
            item = items[_order(self.config.seed, epoch, len(items))[place_in]]
            self.state.cursor += 1
            p = self.state.solved.get(item.id)
            if self.config.grpo.curriculum and p is not None:
                chance = random.Random(f"{self.config.seed} {self.state.cursor}").random()
                if chance > 0.1 + 3.6 * p * (1 - p):
                    continue
            chosen.append(item)
            if len(chosen) == count:
                break
        return chosen or [items[0]]

    # Learning

    def _learn(self, episodes: list[Episode]) -> Learned:
        """One or more optimizer steps on a batch of episodes."""
        grpo = self.config.grpo
        settings = self._loss_settings()
        # Without a KL a group of equal rewards has no gradient: it counts in the totals and needs no forward pass.
        needed = [it for it in episodes if it.teaches or settings.beta or self.config.guard.kl]
        groups = [Group(it.asking.ids, [reply.ids for reply in it.replies]) for it in needed]
        learned_tokens = sum(len(reply.ids) for it in episodes for reply in it.replies if self._counts(reply))
        totals = Totals(sum(len(it.replies) for it in episodes), learned_tokens, grpo.max_tokens)
        olds: dict[int, Tensor] = {}
        lr = rate(self.config.optimizer, self.state.step, grpo.steps)
        for _ in range(grpo.updates):
            self.optimizer.zero_grad()
            sums = _Sums()
            for n, indices in enumerate(micro_batches(groups, grpo.token_budget)):
                batch = [needed[index] for index in indices]
                old = self._backward([groups[index] for index in indices], batch, settings, totals, olds.get(n), sums)
                olds[n] = old
            self._check_mismatch(sums)
            gradient = clip_and_step(self.policy, self.optimizer, self.config.optimizer, lr, sums.loss)
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
        sampled = _padded([reply.logprobs for reply in replies], old)
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
            exact = self.rollouts.weights != "served" or rollout.temperature != 1.0
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

    def _check_mismatch(self, sums: _Sums) -> None:
        """The canary: an engine that has another adapter, or none, does not say what the trainer says."""
        limit = self.config.rollout.kl_stop or self.rollouts.kl_stop
        if sums.kl > limit:
            raise UserError(
                f"at step {self.state.step} the engine's replies are {sums.kl:.2g} nats a token from the trainer's "
                f"distribution, more than {limit:g}: it may have an old adapter",
                "resume from the last checkpoint; if it stays so, set rollout.weights or rollout.kl_stop",
            )

    # Guards

    def _watch(self, record: dict[str, Any], report: Report) -> None:
        """Stop what cannot be saved; go back to the best checkpoint where a run is going wrong."""
        state, guard = self.state, self.config.guard
        state.cut = state.cut + 1 if 0 < guard.truncated < record["truncated"] else 0
        if state.cut >= _CUT_STEPS:
            raise UserError(
                f"nearly all replies are cut off at {self.config.grpo.max_tokens} tokens", "raise grpo.max_tokens"
            )
        if state.useless >= _USELESS_STEPS:
            raise UserError(
                f"no group taught anything for {_USELESS_STEPS} steps: all replies to a prompt get the same reward",
                "an easier or harder task, or more replies a group; `stillhouse train probe` tells which",
            )
        state.first_length = state.first_length or record["tokens"]
        reasons = []
        if guard.entropy and record.get("entropy", 1.0) < guard.entropy:
            reasons.append(f"the entropy is {record['entropy']:.3f}, under {guard.entropy:g}")
        if guard.kl and record.get("kl_base", 0.0) > guard.kl:
            reasons.append(f"the KL from the base is {record['kl_base']:.3f}, over {guard.kl:g}")
        if guard.length and record["tokens"] > guard.length * state.first_length:
            reasons.append(f"replies are {record['tokens']:.0f} tokens long, {guard.length:g} times those at the start")
        state.strikes = state.strikes + 1 if reasons else 0
        if state.strikes < guard.strikes:
            return
        state.strikes = 0
        state.rollbacks += 1
        if state.rollbacks > _ROLLBACKS or not self.folder.restore(self.policy, self.optimizer, best=True):
            raise UserError(f"the run is going wrong: {reasons[0]}", "lower optimizer.lr, or raise the guard")
        self.folder.log({"step": state.step, "kind": "rollback", "reason": reasons[0]})
        report(f"step {state.step}  {reasons[0]}: back to the best checkpoint")


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


def _places(n: int, group: int) -> range:
    """Where the replies of the n-th group lie among all."""
    return range(n * group, (n + 1) * group)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    """The items of an epoch, shuffled."""
    return random.Random(hashlib.sha256(f"{seed} {epoch}".encode()).digest()).sample(range(count), count)


def _padded(rows: list[list[float]], like: Tensor) -> Tensor:
    """(B,) lists -> (B, T), 0 behind their ends."""
    padded = torch.zeros_like(like)
    for n, row in enumerate(rows):
        padded[n, : len(row)] = torch.tensor(row, dtype=like.dtype)
    return padded
