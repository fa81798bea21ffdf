"""Can this be learned? A look at a task before training on it: what there is to learn from, and what a step costs.

Knows nothing of where the run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .evaluate import Interval, bootstrap, chance_of_one
from .policy import Group
from .update import peak_memory

if TYPE_CHECKING:
    from .episodes import Episode
    from .grpo import Run

_ITEMS = 24
_LEAST_USEFUL = 0.05  # of the groups
_MOST_CUT = 0.5  # of the replies


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe found."""

    pass_1: Interval
    pass_k: Interval
    group: int
    useful: float  # share of groups whose rewards differ
    well_formed: float | None
    truncated: float
    longest: int  # tokens, 99th percentile
    rollout_s: float  # a step
    update_s: float
    tokens_s: float  # drawn
    peak_gb: float
    hopeless: bool
    words: str

    def __str__(self) -> str:
        rows = [
            ("pass@1", str(self.pass_1)),
            (f"pass@{self.group}", str(self.pass_k)),
            ("useful groups", f"{self.useful:.2f}  (replies that differ in their reward; 0.3 and more learn well)"),
            ("right format", "-" if self.well_formed is None else f"{self.well_formed:.2f}"),
            ("cut off", f"{self.truncated:.2f}  (99 % of the replies have {self.longest} tokens or fewer)"),
            ("rollouts", f"{self.rollout_s:.1f} s a step, {self.tokens_s:.0f} tokens/s"),
            ("update", f"{self.update_s:.1f} s a step"),
            ("memory", f"{self.peak_gb:.2f} GB at most so far"),
            ("verdict", self.words),
        ]
        return "\n".join(f"{name:<14} {value}" for name, value in rows)


def probe(run: Run, report: Callable[[str], None]) -> Verdict:
    """Draw a group for some items that are trained on, and time a step."""
    grpo = run.config.grpo
    items = list(run.task.train[:_ITEMS])
    report(f"probing {len(items)} items of {run.task.name}, {grpo.group} replies each")
    run.hand_over()
    started = time.perf_counter()
    episodes = run.episodes(items, f"{run.config.seed} probe")
    drawn_s = time.perf_counter() - started
    right = [sum((part.get("accuracy") or 0.0) >= 1.0 for part in it.parts) for it in episodes]
    replies = [reply for it in episodes for reply in it.replies]
    formats = [value for it in episodes for part in it.parts if (value := part.get("format")) is not None]
    lengths = sorted(len(reply.ids) for reply in replies)
    useful = sum(it.teaches for it in episodes) / len(episodes)
    cut = sum(reply.truncated for reply in replies) / len(replies)
    rates = [count / grpo.group for count in right]
    updated_s = _time_update(run, episodes)
    share = grpo.prompts / len(episodes)
    hopeless, words = _judge(sum(rates) / len(rates), useful, cut, grpo.max_tokens)
    return Verdict(
        bootstrap(rates),
        bootstrap([chance_of_one(grpo.group, count, grpo.group) for count in right]),
        grpo.group,
        useful,
        sum(formats) / len(formats) if formats else None,
        cut,
        lengths[int(len(lengths) * 0.99)],
        drawn_s * share,
        updated_s * grpo.prompts,
        sum(lengths) / drawn_s,
        peak_memory() / 1e9,
        hopeless,
        words,
    )


def _judge(pass_1: float, useful: float, cut: float, max_tokens: int) -> tuple[bool, str]:
    """Whether there is no hope, and why, or what to expect."""
    if cut > _MOST_CUT:
        return True, f"{cut:.0%} of the replies are cut off at {max_tokens} tokens; raise grpo.max_tokens"
    if useful < _LEAST_USEFUL and pass_1 > 0.5:
        return True, "it is solved already: nearly all replies are right; take a harder task"
    if useful < _LEAST_USEFUL:
        return True, "nearly all replies to a prompt get the same reward; an easier task, or `train sft` first"
    if useful < 0.3:
        return False, "it can learn, slowly: few groups differ; more replies a group or a cold start would help"
    return False, "it can learn"


def _time_update(run: Run, episodes: list[Episode]) -> float:
    """Seconds that learning from one group takes; nothing is learned."""
    episode = max(episodes, key=lambda it: sum(len(reply.ids) for reply in it.replies))
    started = time.perf_counter()
    scores = run.policy.score([Group(episode.asking.ids, [reply.ids for reply in episode.replies])])
    scores.logp.sum().backward()
    run.optimizer.zero_grad()
    return time.perf_counter() - started
