"""A run as one HTML page: curves, what changed, samples, second thoughts, the configuration. No scripts, no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..r1.errors import UserError
from .reflect import LISTS, reflects

_WIDTH, _HEIGHT, _MARGIN = 420, 150, 34
_CURVES = (  # key in the log, title
    ("reward", "reward"),
    ("useful", "groups that teach something"),
    ("tokens", "tokens a reply"),
    ("truncated", "replies cut off"),
    ("entropy", "entropy, nats a token"),
    ("loss", "loss (0 by design where old and new policy are the same)"),
    ("gradient", "gradient norm"),
    ("change", "adapter beside the weights"),
    ("mismatch_kl", "KL between engine and trainer, nats a token"),
    ("mismatch_ess", "effective share of the replies"),
)
_SAMPLES = 6
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2 { font-weight: 600 } figure { display: inline-block; margin: 0 1em 1em 0 } figcaption { font-size: 13px }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .7em; border-radius: 4px; font-size: 13px }
td, th { text-align: left; padding: .15em 1em .15em 0; font-variant-numeric: tabular-nums } svg text { font-size: 11px }
.right { border-left: 3px solid #2a7 } .wrong { border-left: 3px solid #c55 }
"""


def write_report(folder: Path, output: Path) -> Path:
    """Write the page. Raises `UserError` where there is no run."""
    records = _records(folder / "log.jsonl")
    if not records:
        raise UserError(f"there is no run with a log in {folder}", "name the folder of a run")
    completions = _records(folder / "completions.jsonl")
    steps = [record for record in records if record["kind"] in ("grpo", "sft")]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    config = (folder / "config.toml").read_text(encoding="utf-8")
    parts = [
        f"<h1>{html.escape(folder.name)}</h1>",
        _evaluations(evaluations),
        "<h2>Curves</h2>",
        *(_curve(steps, key, title) for key, title in _CURVES),
        *(_curve(steps, key, key.replace("_", ": ", 1)) for key in sorted(steps[0]) if key.startswith("reward_")),
        _thoughts(completions),
        _samples(completions),
        f"<h2>Configuration</h2><pre>{html.escape(config)}</pre>",
    ]
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title><style>{_STYLE}</style>"
    output.write_text(page + "\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    return output


def _evaluations(records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    rows = "".join(
        f"<tr><td>{it['step']}<td>{it['pass_1'][0]:.3f}<td>{it['pass_1'][1]:.3f} to {it['pass_1'][2]:.3f}"
        f"<td>{it['format']:.2f}<td>{it['truncated']:.2f}<td>{it['tokens']:.0f}<td>{it['items']}"
        for it in records
    )
    head = "<tr><th>step<th>pass@1<th>95 %<th>format<th>cut off<th>tokens<th>items"
    return f"<h2>Held-out items</h2><table>{head}{rows}</table>"


def _curve(records: Sequence[dict[str, Any]], key: str, title: str) -> str:
    """One line over the steps, as SVG."""
    points = [(it["step"], float(it[key])) for it in records if isinstance(it.get(key), (int, float))]
    if len(points) < 2:
        return ""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    span, length = high - low or 1.0, max(1, steps[-1] - steps[0])
    inner_width, inner_height = _WIDTH - 2 * _MARGIN, _HEIGHT - _MARGIN

    def place(step: float, value: float) -> str:
        x = _MARGIN + (step - steps[0]) / length * inner_width
        return f"{x:.1f},{8 + (high - value) / span * (inner_height - 8):.1f}"

    line = " ".join(place(*point) for point in points)
    return (
        f"<figure><svg width={_WIDTH} height={_HEIGHT} role=img aria-label='{html.escape(title)}'>"
        f"<polyline points='{line}' fill=none stroke='#27a' stroke-width=1.5 />"
        f"<text x=0 y=14>{high:.3g}</text><text x=0 y={inner_height}>{low:.3g}</text>"
        f"<text x={_MARGIN} y={_HEIGHT - 8}>step {steps[0]}</text>"
        f"<text x={_WIDTH - 60} y={_HEIGHT - 8}>{steps[-1]}</text></svg>"
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _thoughts(completions: list[dict[str, Any]]) -> str:
    """Whether second thoughts came with right answers: a table of first and last fifth, by list and outcome."""
    judged = [it for it in completions if it.get("parts", {}).get("accuracy") is not None]
    if not judged:
        return ""
    few = max(1, len(judged) // 5)
    rows = []
    for name, words in LISTS.items():
        for when, part in (("first fifth", judged[:few]), ("last fifth", judged[-few:])):
            with_words = [it for it in part if reflects(it["text"], words)]
            without = [it for it in part if not reflects(it["text"], words)]
            rows.append(f"<tr><td>{name}<td>{when}<td>{len(with_words) / len(part):.2f}")
            rows.append(f"<td>{_right(with_words)}<td>{_right(without)}")
    head = "<tr><th>list<th>when<th>replies with such words<th>right, with them<th>right, without"
    note = "<p>Words that sound like second thoughts, as others count them. That they are there says nothing yet."
    return f"<h2>Second thoughts</h2>{note}<table>{head}{''.join(rows)}</table>"


def _right(records: list[dict[str, Any]]) -> str:
    return f"{sum(it['parts']['accuracy'] >= 1 for it in records) / len(records):.2f}" if records else "-"


def _samples(completions: list[dict[str, Any]]) -> str:
    if not completions:
        return ""
    parts = ["<h2>Samples</h2>"]
    for when, chosen in (("first", completions[:_SAMPLES]), ("last", completions[-_SAMPLES:])):
        parts.append(f"<h3>The {when}</h3>")
        for it in chosen:
            kind = "right" if it["advantage"] > 0 else "wrong"
            told = f"step {it['step']}, {it['item']}, reward {it['reward']:.2f}, {it['tokens']} tokens"
            parts.append(f"<p>{html.escape(told)}<pre class={kind}>{html.escape(it['text'])}</pre>")
    return "".join(parts)


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
