"""The rows of the second round: new questions of the nine families that a first round made learnable, and the chat.

python second.py > second.jsonl
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from families import HELD_OUT, HELD_OUT_SEED, questions

LEFT_OUT = {"length", "ordering", "backwards"}  # hardly any right after the first round, and long
COUNT = 480
POLITE = 25  # the first rows of the chat (greetings, who are you) come twice


def main() -> None:
    held_out = frozenset(it.text for _, it in questions(HELD_OUT, HELD_OUT_SEED))
    rows = [
        json.dumps(
            {"prompt": it.text, "response": f"<think>\n{it.thoughts}\n</think>\n\n{it.answer}", "family": family}
        )
        for family, it in questions(2200, 3, held_out)
        if family not in LEFT_OUT
    ]
    random.Random(0).shuffle(rows)
    chat = Path(__file__).with_name("chat.jsonl").read_text(encoding="utf-8").splitlines()
    print("\n".join([*rows[:COUNT], *chat, *chat[:POLITE]]))


if __name__ == "__main__":
    main()
