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
from typing import Any

import torch

from ..backends.base import BackendFailed
from ..r1.errors import UserError
from .basemodel import read_base
from .checkpoint import RunFolder, adapter_of, start_from
from .config import RunConfig
from .episodes import Episode, completions, describe, line
from .evaluate import Evaluation, evaluate, form_of, require_answers
from .export import save_gguf
from .learn import Learner
from .live import open_fitting, room_for
from .loss import advantages
from .policy import Policy
from .rewards import Asked, Rewards, Scored
from .rollout import Asking, Reply, Rollouts, find_model, remove_copies
from .tasks import Item, Task, messages, open_task
from .update import give_back_memory, make_optimizer, peak_memory, place, rate, use_threads

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
    engine: str = ""  # that draws its replies
    first_length: float = 0.0  # tokens a reply, at the first step
    strikes: int = 0  # steps in a row that a guard disliked
    rollbacks: int = 0
    useless: int = 0  # steps in a row without a group that teaches
    cut: int = 0  # steps in a row with nearly all replies cut off
    solved: dict[str, float] = field(default_factory=dict)  # item id -> running accuracy


def run_grpo(config: RunConfig, *, resume: bool = False, anyway: bool = False, report: Report = print) -> Run:
    """Train, or go on training, in the run's folder. Raises `UserError`; what is saved stays good."""
    run = open_run(config, resume=resume, report=report)
    try:
        if run.state.step == 0 and not anyway:
            refuse_hopeless(run, report)
        run.go(report)
    finally:
        run.close()
    return run


def open_run(config: RunConfig, *, resume: bool = False, report: Report = print) -> Run:
    """Load everything that a run needs."""
    rewards = Rewards(config.rewards, config.gates)  # what is cheap to get wrong comes first
    paths, _ = find_model(config.model.name)
    task = open_task(config.task)
    rewards.check((*task.train, *task.held_out), config.task.name)
    require_answers(task.held_out[: config.evaluation.items], config.task.held_out or config.task.name)
    folder = RunFolder(Path(config.out))
    folder.begin(config, resume=resume)
    use_threads(config.rollout.threads)
    device, dtype = place(config.model)
    base = read_base(paths, dtype, config.model.weights)
    base.module.to(device)
    policy = Policy(base, config.lora.rank, config.lora.alpha, config.seed, config.model.checkpointing)
    optimizer = make_optimizer(policy, config.optimizer)
    restored = folder.restore(policy, optimizer) if resume else None
    if config.lora.start and not restored:
        start_from(policy, config.lora.start)
    folder.start(config, restored)
    state = State(**restored.state) if restored else State()

    drawing = config.rollout
    if not drawing.prompt_tokens:
        asked = [messages(it, config.task) for it in (*task.train, *task.held_out)]
        drawing = dataclasses.replace(drawing, prompt_tokens=room_for(paths, asked))

    def take(rollouts: Rollouts) -> None:
        rollouts.take(lambda path: save_gguf(adapter_of(policy), path))

    rollouts = open_fitting(
        policy,
        drawing,
        config.grpo.max_tokens,
        folder.path,
        take=take,
        prompts=lambda rollouts: [rollouts.ask(messages(it, config.task)).ids for it in task.train[:2]],
        chosen=state.engine,
        report=report,
    )
    state.engine = "pytorch" if rollouts.is_live else "llama.cpp"
    if drawing.engine == "pytorch" and device.type == "cpu" and config.model.weights != "expanded":
        report('rollouts: PyTorch makes all numbers anew for every token; model.weights = "expanded" would be faster')
    give_back_memory()  # that loading took: the first step has its own use for it
    kl_stop = config.rollout.kl_stop or rollouts.kl_stop
    learner = Learner(config, policy, optimizer, rollouts.weights != "served", kl_stop)
    return Run(config, folder, task, policy, optimizer, rollouts, rewards, state, learner)


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
    learner: Learner

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
        try:
            episodes, asked = self._collect()
        except BackendFailed as error:
            raise UserError(
                f"step {self.state.step} drew nothing with the adapter of the step before: {error.message}",
                "lower optimizer.lr and go on with --resume; a checkpoint that cannot be gone on from may be deleted",
            ) from None
        drawn_at = time.perf_counter()
        useful = not self.learner.compares or any(episode.teaches for episode in episodes)
        record: dict[str, Any] = {"step": self.state.step, "kind": "grpo"}
        record |= describe(asked)
        record["useful"] = sum(episode.teaches for episode in asked) / len(asked)
        if useful:
            self.state.useless = 0
            learned = self.learner.learn(episodes, self.state.step)
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
            form=form_of(self.config.rewards),
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

    # Guards

    def _watch(self, record: dict[str, Any], report: Report) -> None:
        """Stop what cannot be saved; go back to the best checkpoint where a run is going wrong."""
        state, guard = self.state, self.config.guard
        state.cut = state.cut + 1 if 0 < guard.truncated < record["truncated"] else 0
        if state.cut >= _CUT_STEPS:
            raise UserError(
                f"nearly all replies are cut off at {self.config.grpo.max_tokens} tokens",
                "raise grpo.max_tokens, and go on with --resume",
            )
        if state.useless >= _USELESS_STEPS:
            raise UserError(
                f"no group taught anything for {_USELESS_STEPS} steps: all replies to a prompt get the same reward",
                "`stillhouse train probe` tells whether it is too easy or too hard; --resume goes on",
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


def _places(n: int, group: int) -> range:
    """Where the replies of the n-th group lie among all."""
    return range(n * group, (n + 1) * group)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    """The items of an epoch, shuffled."""
    return random.Random(hashlib.sha256(f"{seed} {epoch}".encode()).digest()).sample(range(count), count)
