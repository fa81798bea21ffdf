"""Words that sound like second thoughts, counted. Knows nothing of whether they helped: compare with the answers.

The lists are those of others, kept apart, since they do not agree: "but" and "however" are on one only, and base models
say all of them before any training ("There may not be aha moment in R1-Zero-like training", Sea AI Lab).
"""

from __future__ import annotations

from collections.abc import Sequence

LISTS = {
    "r1": (  # DeepSeek-R1, figure on the evolution of reflective words
        *("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check"),
    ),
    "oat": (  # Sea AI Lab's oat-zero
        *("recheck", "rethink", "reevaluate", "re-evaluate", "reevaluation", "re-examine", "reexamine", "try again"),
        *("check again", "think again", "go over the steps"),
    ),
}


def reflects(text: str, words: Sequence[str]) -> bool:
    """Whether a text has any of some words, as parts of words too, as the papers count."""
    low = text.lower()
    return any(word in low for word in words)


def reflections(texts: Sequence[str]) -> dict[str, float]:
    """The share of texts with a word of each list."""
    return {
        name: sum(reflects(text, words) for text in texts) / len(texts) if texts else 0.0
        for name, words in LISTS.items()
    }
