"""Stop strings: text in, text out up to the first of them. Knows nothing of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .split import overlap


class StopStrings:
    """Watches one text for several strings and holds back what might be the start of one."""

    __slots__ = ("_held", "_may_stop", "_stops", "hit")

    def __init__(self, stops: Sequence[str], may_stop: Callable[[str], bool] = lambda text: True) -> None:
        self._stops = tuple(stops)
        self._may_stop = may_stop  # asked with what would be given before a stop string; else that is only text
        self._held = ""
        self.hit: str | None = None  # the one that was found

    def add(self, text: str) -> str:
        """Take the next piece; give what is surely before any stop string. After a hit, nothing."""
        if self.hit is not None:
            return ""
        if not self._stops:
            return text
        text, self._held = self._held + text, ""
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        found = [(at, stop) for at, stop in found if self._may_stop(text[:at])]
        if found:  # the one that is complete first, as in a text that comes character by character
            at, self.hit = min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
            return text[:at]
        hold = max(overlap(text, stop) for stop in self._stops)
        if hold:
            text, self._held = text[:-hold], text[-hold:]
        return text

    def finish(self) -> str:
        """Give what was held back: no stop string followed."""
        held, self._held = self._held, ""
        return held
