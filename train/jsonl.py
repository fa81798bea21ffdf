"""Records as lines of JSON, as a run's log and completions and a collection of replies are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def as_line(record: Any) -> str:
    """A record as a line."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_whole(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none where there is no file; a line that was cut off by a crash is dropped."""
    found = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").split("\n"):  # other ends of a line may stand in a reply
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
    return found
