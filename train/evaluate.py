"""How good a model is at a task, with how sure that is: pass@1, pass@k, maj@k and what two models differ by.

Knows nothing of training; the statistics need nothing but the standard library.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..r1.errors import UserError
from .config import TaskConfig
from .rewards import Asked, Rewards, answer_in
from .rollout import Rollouts
from .tasks import Item, messages

_RESAMPLES = 2000
_Z = 1.959964  # 95 %


class Interval(NamedTuple):
    """An estimate and the 95 % interval around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Judged(NamedTuple):
    """One item's replies."""

    item_id: str
    right: tuple[bool, ...]
    answers: tuple[str | None, ...]
    well_formed: tuple[bool, ...]
    truncated: tuple[bool, ...]
    lengths: tuple[int, ...]  # tokens
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model on some items, k replies each."""

    judged: tuple[Judged, ...]

    @property
    def samples(self) -> int:
        """Replies an item."""
        return len(self.judged[0].right)

    @property
    def pass_1(self) -> Interval:
        """Share of right replies; with one reply an item Wilson's interval, else a bootstrap over the items."""
        rates = [sum(it.right) / len(it.right) for it in self.judged]
        if self.samples == 1:
            return wilson(int(sum(rates)), len(rates))
        return bootstrap(rates)

    def pass_k(self, k: int) -> Interval:
        """Chance that one of k replies is right, without bias: 1 - C(n-c, k) / C(n, k)."""
        return bootstrap([chance_of_one(len(it.right), sum(it.right), k) for it in self.judged])

    @property
    def majority(self) -> Interval:
        """Share of items whose most frequent answer is right (maj@k); no answer is no vote."""
        return bootstrap([float(_majority_right(it)) for it in self.judged])

    @property
    def format(self) -> float:
        """Share of well-formed replies."""
        return _share([flag for it in self.judged for flag in it.well_formed])

    @property
    def truncated(self) -> float:
        """Share of replies that were cut off."""
        return _share([flag for it in self.judged for flag in it.truncated])

    @property
    def tokens(self) -> float:
        """Mean length of a reply."""
        lengths = [length for it in self.judged for length in it.lengths]
        return sum(lengths) / len(lengths)

    @property
    def useful(self) -> float:
        """Share of items whose replies are neither all right nor all wrong."""
        return _share([0 < sum(it.right) < len(it.right) for it in self.judged])

    def summary(self) -> dict[str, object]:
        """For a log: plain numbers."""
        numbers: dict[str, object] = {
            "items": len(self.judged),
            "samples": self.samples,
            "pass_1": self.pass_1,
            "format": self.format,
            "truncated": self.truncated,
            "tokens": self.tokens,
        }
        if self.samples > 1:
            numbers |= {f"pass_{self.samples}": self.pass_k(self.samples), "majority": self.majority}
        return numbers


def require_answers(items: Sequence[Item], where: str) -> None:
    """Raise `UserError` for an item that has no answer to be judged by."""
    Rewards({"accuracy": 1.0}).check(items, where)


def evaluate(
    rollouts: Rollouts,
    items: Sequence[Item],
    task: TaskConfig,
    *,
    samples: int = 1,
    max_tokens: int = 96,
    temperature: float = 1.0,
    top_p: float = 1.0,
    form: str = "format",
    seed: str = "evaluation",
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Have every item answered `samples` times and judged by the accuracy reward; `form`: the reward for the format."""
    if not items:
        raise UserError("there is no held-out item to measure with", "raise task.held_out_size, or set task.held_out")
    asked = [rollouts.ask(messages(item, task)) for item in items]
    seeds = [f"{seed} {item.id}" for item in items]
    progress(f"{len(items)} items, {samples} replies each")
    drawn = rollouts.draw([it.ids for it in asked], samples, max_tokens, seeds, temperature=temperature, top_p=top_p)
    judge = Rewards({"accuracy": 1.0, form: 1.0})
    scored = judge(
        Asked(
            [item.prompt for item in items for _ in range(samples)],
            [reply.text for replies in drawn for reply in replies],
            [reply.ids for replies in drawn for reply in replies],
            [item.columns for item in items for _ in range(samples)],
            [item.id for item in items for _ in range(samples)],
            [it.prefix for it in asked for _ in range(samples)],
            [reply.truncated for replies in drawn for reply in replies],
            max_tokens,
        )
    ).parts
    judged: list[Judged] = []
    for n, (item, replies) in enumerate(zip(items, drawn, strict=True)):
        at = slice(n * samples, (n + 1) * samples)
        plain = form == "thoughts" or "entry" not in item.columns
        judged.append(
            Judged(
                item.id,
                tuple((value or 0.0) >= 1.0 for value in scored["accuracy"][at]),
                tuple(answer_in(reply.text, plain=plain) for reply in replies),
                tuple((value or 0.0) >= 1.0 for value in scored[form][at]),
                tuple(reply.truncated for reply in replies),
                tuple(len(reply.ids) for reply in replies),
                tuple(reply.text for reply in replies),
            )
        )
    return Evaluation(tuple(judged))


def form_of(rewards: Mapping[str, float]) -> str:
    """The reward that tells what the right format is, where these are what is learned from."""
    return "thoughts" if "thoughts" in rewards else "format"


def by_column(evaluation: Evaluation, items: Sequence[Item], column: str) -> dict[str, Evaluation]:
    """The evaluation in parts, one for each value that a column of the items has."""
    parts: dict[str, list[Judged]] = {}
    for item, judged in zip(items, evaluation.judged, strict=True):
        parts.setdefault(str(item.columns.get(column, "-")), []).append(judged)
    return {value: Evaluation(tuple(some)) for value, some in sorted(parts.items())}


def difference(before: Evaluation, after: Evaluation) -> Interval:
    """How much better `after` is in pass@1, on the same items: a paired bootstrap."""
    pairs = zip(before.judged, after.judged, strict=True)
    gains = []
    for old, new in pairs:
        assert old.item_id == new.item_id, "different items cannot be compared pair by pair"
        gains.append(sum(new.right) / len(new.right) - sum(old.right) / len(old.right))
    return bootstrap(gains)


def chance_of_one(replies: int, right: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): that one of k of n replies is right, when c of the n are.

    >>> chance_of_one(4, 1, 1), chance_of_one(4, 1, 4), chance_of_one(4, 2, 2)
    (0.25, 1.0, 0.8333333333333334)
    """
    return 1.0 - math.comb(replies - right, k) / math.comb(replies, k)


def wilson(right: int, count: int) -> Interval:
    """Wilson's score interval for a share."""
    share, square = right / count, _Z * _Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean and its percentile interval over resampled items; the same values give the same interval."""
    chance, count = random.Random(seed), len(values)
    means = sorted(sum(chance.choices(values, k=count)) / count for _ in range(_RESAMPLES))
    low, high = means[int(_RESAMPLES * 0.025)], means[int(_RESAMPLES * 0.975) - 1]
    return Interval(sum(values) / count, low, high)


def _majority_right(judged: Judged) -> bool:
    votes = Counter(answer for answer in judged.answers if answer is not None)
    if not votes:
        return False
    most = max(votes.values())
    winner = next(answer for answer in judged.answers if answer is not None and votes[answer] == most)
    return judged.right[judged.answers.index(winner)]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
