"""How many prompt tokens a step may carry. Knows nothing of any runtime."""

from __future__ import annotations

_STEP_S = 1.0  # a step that reads a prompt takes about so long at most
_LEAST_CHUNK = 32  # tokens: smaller ones read a prompt much slower


class Pace:
    """Learns how fast prompts are read, so that replies beside one don't stall and a cancellation is not late.

    `steady`: nobody waits, so every step carries as much as it can, and the same on every machine.
    """

    def __init__(self, most: int, *, steady: bool = False) -> None:
        self._most = most
        self._steady = steady
        self._token_s = _STEP_S / min(most, 256)  # measured as soon as a prompt has been read

    def chunk(self, *, replying: bool) -> int:
        """Prompt tokens for the next step; a third as long where replies wait for it."""
        if self._steady:
            return self._most
        step_s = _STEP_S / 3 if replying else _STEP_S
        return max(_LEAST_CHUNK, min(self._most, int(step_s / self._token_s)))

    def note(self, tokens: int, seconds: float) -> None:
        """Learn from a step; those of a few tokens tell nothing, they are as slow as one of many."""
        if tokens >= _LEAST_CHUNK:
            self._token_s += 0.3 * (seconds / tokens - self._token_s)
