"""What was asked, said and earned in a step, and how to tell it. Knows nothing of the model."""

from __future__ import annotations

from typing import Any, NamedTuple

from .reflect import reflections
from .rollout import Asking, Reply
from .tasks import Item


class Episode(NamedTuple):
    """A prompt, its replies, and what they got."""

    item: Item
    asking: Asking
    replies: list[Reply]
    rewards: list[float]
    parts: list[dict[str, float | None]]  # by reward, one a reply
    advantages: list[float]

    @property
    def teaches(self) -> bool:
        """Whether some replies were better than others."""
        return any(self.advantages)

    def pieces(self, budget: int) -> list[Episode]:
        """The episode in parts of at most `budget` tokens each, prompt included; one reply at least."""
        parts: list[Episode] = []
        start, used = 0, len(self.asking.ids)
        for end, reply in enumerate(self.replies):
            if end > start and used + len(reply.ids) > budget:
                parts.append(self._cut(start, end))
                start, used = end, len(self.asking.ids)
            used += len(reply.ids)
        return [*parts, self._cut(start, len(self.replies))]

    def _cut(self, start: int, end: int) -> Episode:
        at = slice(start, end)
        return self._replace(
            replies=self.replies[at], rewards=self.rewards[at], parts=self.parts[at], advantages=self.advantages[at]
        )


def describe(episodes: list[Episode]) -> dict[str, Any]:
    """What was said, in numbers: rewards, lengths by right and wrong, reflection."""
    replies = [reply for episode in episodes for reply in episode.replies]
    parts = [part for episode in episodes for part in episode.parts]
    rewards = [reward for episode in episodes for reward in episode.rewards]
    right = [(part.get("accuracy") or 0.0) >= 1.0 for part in parts]
    lengths = [len(reply.ids) for reply in replies]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    described: dict[str, Any] = {
        "replies": len(replies),
        "reward": mean(rewards),
        "truncated": mean([float(reply.truncated) for reply in replies]),
        "tokens": mean([float(length) for length in lengths]),
        "tokens_right": mean([float(n) for n, good in zip(lengths, right, strict=True) if good]),
        "tokens_wrong": mean([float(n) for n, good in zip(lengths, right, strict=True) if not good]),
        "reflections": reflections([reply.text for reply in replies]),
    }
    for name in parts[0]:
        described[f"reward_{name}"] = mean([value for part in parts if (value := part[name]) is not None])
    return described


def completions(step: int, episodes: list[Episode]) -> list[dict[str, Any]]:
    """One record a reply, to be kept."""
    return [
        {
            "step": step,
            "item": episode.item.id,
            "prompt": episode.item.question,
            "text": reply.text,
            "reward": reward,
            "parts": part,
            "advantage": advantage,
            "tokens": len(reply.ids),
            "truncated": reply.truncated,
        }
        for episode in episodes
        for reply, reward, part, advantage in zip(
            episode.replies, episode.rewards, episode.parts, episode.advantages, strict=True
        )
    ]


def line(record: dict[str, Any], last: int) -> str:
    """A step for the terminal."""
    words = [f"step {record['step']}/{last}", f"reward {record['reward']:.3f}", f"useful {record['useful']:.2f}"]
    if "loss" in record:
        words += [f"loss {record['loss']:+.4f}", f"entropy {record['entropy']:.2f}", f"kl {record['mismatch_kl']:.1e}"]
    words += [
        f"tokens {record['tokens']:.0f}",
        f"cut off {record['truncated']:.2f}",
        f"{record['rollout_s']:.1f} + {record['update_s']:.1f} s",
    ]
    return "  ".join(words)
