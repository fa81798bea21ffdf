"""A run as one HTML page: curves, what changed, samples, second thoughts, the configuration. No scripts, no network."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..r1.clock import duration
from ..r1.errors import UserError
from .curves import STYLE, Line, draw
from .jsonl import read_whole
from .reflect import LISTS, reflects

_CURVES = (  # title; keys in the log, with a label where there are two
    ("groups that teach something", {"useful": ""}),
    ("tokens a reply", {"tokens_right": "right", "tokens_wrong": "wrong"}),
    ("replies cut off", {"truncated": ""}),
    ("replies with second thoughts", {"r1": "R1's list", "oat": "oat's"}),
    ("entropy, nats a token", {"entropy": ""}),
    ("gradient norm", {"gradient": ""}),
    ("size of the change", {"change": ""}),
    ("KL from the base, nats a token", {"kl_base": ""}),
    ("KL between engine and trainer", {"mismatch_kl": ""}),
    ("effective share of the replies", {"mismatch_ess": "", "mismatch_ess_applied": "corrected"}),
    ("seconds a step", {"rollout_s": "rollouts", "update_s": "update"}),
)
_GROUPS = 3  # of samples, at the beginning and at the end
_STYLE = """
:root { color-scheme: light dark; --text: #1d2023; --dim: #5c646b; --page: #fff; --box: #f4f5f6; --rule: #e2e5e8;
  --right: #16794a; --wrong: #b3372f; --line0: #1f6fb2; --line1: #b05a00 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e8; --dim: #9aa2a9; --page: #16181a; --box: #212427;
  --rule: #33383c; --right: #4cc38a; --wrong: #f2776d; --line0: #64b0ec; --line1: #f0a04b } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 1.5em auto; padding: 0 1em;
  color: var(--text); background: var(--page); overflow-wrap: anywhere }
h1, h2 { font-weight: 600; line-height: 1.2 } h2 { margin-top: 1.8em } h3 { margin: 1.4em 0 .2em; font-size: 1em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); padding: .6em .8em; margin: .3em 0 .9em;
  border-radius: 4px; border-left: 4px solid var(--rule); font: 14px/1.5 ui-monospace, monospace }
.scroll { overflow-x: auto } table { border-collapse: collapse } summary { cursor: pointer }
td, th { text-align: left; padding: .2em 1.2em .2em 0; font-variant-numeric: tabular-nums; white-space: nowrap }
th { font-weight: normal; color: var(--dim) } .dim { color: var(--dim) } .told { margin: 0; font-size: 14px }
pre.right { border-color: var(--right) } pre.wrong { border-color: var(--wrong) }
b.right { color: var(--right) } b.wrong { color: var(--wrong) }
"""
_HEAD = (
    "<!doctype html><html lang=en><meta charset=utf-8>"
    '<meta name=viewport content="width=device-width, initial-scale=1">'
)


def write_report(folder: Path, output: Path) -> Path:
    """Write the page. Raises `UserError` where there is no run, or no room for the page."""
    records = read_whole(folder / "log.jsonl")
    if not records:
        raise UserError(f"there is no run with a log in {folder}", "name the folder of a run")
    completions = read_whole(folder / "completions.jsonl")
    steps = [record for record in records if record["kind"] in ("grpo", "sft")]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    config = folder / "config.toml"
    name = html.escape(folder.resolve().name)
    parts = [
        f"{_HEAD}<title>{name}</title><style>{_STYLE}{STYLE}</style><h1>{name}</h1>",
        _summary(steps, evaluations),
        _evaluations(evaluations),
        _curves(steps, evaluations, [record["step"] for record in records if record["kind"] == "rollback"]),
        _thoughts(completions),
        _samples(completions),
    ]
    if config.exists():
        told = html.escape(config.read_text(encoding="utf-8"))
        parts.append(f"<h2>Configuration</h2><details><summary>every setting</summary><pre>{told}</pre></details>")
    try:
        output.write_text("\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}", "name another file with --output") from None
    return output


def _summary(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    """A line on what this was: how many steps, how long, how good before and after."""
    words = []
    if steps:
        last = steps[-1]
        seconds = last.get("seconds") or sum(it.get("rollout_s", 0.0) + it.get("update_s", 0.0) for it in steps)
        kind = {"sft": "supervised fine-tuning", "grpo": "reinforcement learning"}[last["kind"]]
        count = f"{last['step']} step{'s' if last['step'] > 1 else ''}"
        words.append(f"{count} of {kind} in {duration(seconds)}")
        if peak := max((it.get("peak_gb", 0.0) for it in steps), default=0.0):
            words.append(f"{peak:.1f} GB at most")
    if evaluations and (count := evaluations[-1]["items"]):
        before, after = (evaluations[n]["pass_1"][0] for n in (0, -1))
        change = f"{before:.2f} to {after:.2f}" if len(evaluations) > 1 else f"{after:.2f}"
        words.append(f"pass@1 {change} on {count} held-out item{'s' if count > 1 else ''}")
    return f"<p>{html.escape(', '.join(words))}" if words else ""


def _evaluations(records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    rows = "".join(
        f"<tr><td>{it['step']}<td>{it['pass_1'][0]:.3f}<td>{it['pass_1'][1]:.3f} to {it['pass_1'][2]:.3f}"
        f"<td>{it['format']:.2f}<td>{it['truncated']:.2f}<td>{it['tokens']:.0f}<td>{it['items']}"
        for it in records
    )
    head = "<tr><th>step<th>pass@1<th>95 %<th>format<th>cut off<th>tokens<th>items"
    return f"<h2>Held-out items</h2><div class=scroll><table>{head}{rows}</table></div>"


def _curves(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], rollbacks: list[int]) -> str:
    """What changed from step to step; a broken line where a guard went back to the best checkpoint."""
    flat = [it | (it.get("reflections") or {}) for it in steps]
    judged = Line(
        "",
        [(it["step"], it["pass_1"][0]) for it in evaluations],
        [(it["pass_1"][1], it["pass_1"][2]) for it in evaluations],
    )
    is_sft = any(it["kind"] == "sft" for it in steps)
    loss = "loss, nats a token" if is_sft else "loss (0 by design)"
    parts = sorted({key for it in flat for key in it if key.startswith("reward_")})
    figures = [
        draw("pass@1 on held-out items", [judged], rollbacks),
        *([draw(loss, _lines(flat, {"loss": ""}))] if is_sft else []),
        draw("reward", _lines(flat, {"reward": ""}), rollbacks),
        *(draw(key.replace("_", ": ", 1), _lines(flat, {key: ""}), rollbacks) for key in parts),
        *(draw(title, _lines(flat, keys), rollbacks) for title, keys in _CURVES),
        *([] if is_sft else [draw(loss, _lines(flat, {"loss": ""}), rollbacks)]),
    ]
    drawn = "".join(figures)
    if not drawn:
        return ""
    note = "<p class=dim>Broken lines: a guard went back to the best checkpoint." if rollbacks else ""
    return f"<h2>Curves</h2>{note}<div class=curves>{drawn}</div>"


def _lines(records: list[dict[str, Any]], keys: Mapping[str, str]) -> list[Line]:
    return [
        Line(label, [(it["step"], float(it[key])) for it in records if isinstance(it.get(key), (int, float))])
        for key, label in keys.items()
    ]


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
    return f"<h2>Second thoughts</h2>{note}<div class=scroll><table>{head}{''.join(rows)}</table></div>"


def _right(records: list[dict[str, Any]]) -> str:
    return f"{sum(it['parts']['accuracy'] >= 1 for it in records) / len(records):.2f}" if records else "-"


def _samples(completions: list[dict[str, Any]]) -> str:
    """Of some prompts at the beginning and at the end the best and the worst reply."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for it in completions:
        groups.setdefault((it["step"], it["item"]), []).append(it)
    if not groups:
        return ""
    chosen = list(groups.values())
    few = min(_GROUPS, max(1, len(chosen) // 2))
    parts = ["<h2>Samples</h2>"]
    for when, some in (("at the beginning", chosen[:few]), ("at the end", chosen[few:][-few:])):
        for group in some:
            best, worst = max(group, key=_reward), min(group, key=_reward)
            shown = [best] if _reward(best) == _reward(worst) else [best, worst]
            parts.append(f"<h3>Step {best['step']}, {when}: {html.escape(str(best['item']))}</h3>")
            if asked := best.get("prompt"):
                parts.append(f"<p class=told>{html.escape(asked)}")
            parts += [_sample(it, len(group)) for it in shown]
    return "".join(parts)


def _reward(record: dict[str, Any]) -> float:
    return record["reward"]


def _sample(it: dict[str, Any], among: int) -> str:
    accuracy = it.get("parts", {}).get("accuracy")
    kind = "" if accuracy is None else "right" if accuracy >= 1 else "wrong"
    cut = ", cut off" if it.get("truncated") else ""
    told = f"reward {it['reward']:.2f}, {it['tokens']} tokens{cut}, one of {among}"
    thoughts, closed, rest = html.escape(it["text"]).partition("&lt;/think&gt;")
    text = f"<span class=dim>{thoughts}{closed}</span>{rest}" if closed else thoughts
    return f"<p class=told><b class='{kind}'>{kind}</b> <span class=dim>{told}</span><pre class='{kind}'>{text}</pre>"
