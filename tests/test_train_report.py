"""A run as a page: what it shows, and that it can be read on any screen, by day and by night."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser_fixtures import Reader

from stillhouse.r1.errors import UserError
from stillhouse.train.curves import Line, draw
from stillhouse.train.report import write_report

LONG = "<think>\nsteps " + "without_a_gap_" * 40 + "</think>"


def reply(step: int, item: str, text: str, right: bool) -> dict[str, Any]:
    said = {"step": step, "item": item, "prompt": f"ask {item}", "text": text, "reward": float(right), "tokens": 4}
    return said | {"parts": {"accuracy": float(right)}, "advantage": 0.0, "truncated": False}


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run of eight steps, evaluated before and after, with two prompts a step."""
    steps = [
        {"step": n, "kind": "grpo", "reward": n / 9, "entropy": 1.0, "reward_format": 0.5, "tokens_right": 3 + n}
        | {"tokens_wrong": 9, "loss": 0.0, "rollout_s": 60.0, "update_s": 30.0, "reflections": {"r1": 0.1, "oat": 0.0}}
        for n in range(1, 9)
    ]
    found = {"kind": "evaluation", "items": 9, "format": 1.0, "truncated": 0.0, "tokens": 12.0}
    before, after = ({"step": n, "pass_1": [p, p - 0.1, p + 0.1], **found} for n, p in ((0, 0.25), (8, 0.5)))
    back = {"step": 4, "kind": "rollback", "reason": "the entropy"}
    texts = {True: "<think>4</think><answer>4</answer>", False: LONG + "<script>alert(1)</script>"}
    replies = [reply(n, item, texts[good], good) for n in (1, 8) for item in "ab" for good in (False, True, False)]
    for name, lines in {"log": [before, *steps, back, after], "completions": replies}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(it) + "\n" for it in lines), encoding="utf-8")
    (tmp_path / "config.toml").write_text('out = "<run>"\n', encoding="utf-8")
    return tmp_path


def page_of(folder: Path) -> str:
    return write_report(folder, folder / "page.html").read_text(encoding="utf-8")


def test_the_report_shows_curves_evaluations_and_escaped_samples(run):
    page = page_of(run)
    titles = ("pass@1 on held-out items", "reward", "reward: format", "tokens a reply", "loss (0 by design)")
    assert all(f"<b>{title}</b>" in page for title in titles) and page.count("<b>gradient norm") == 0
    assert "8 steps of reinforcement learning in 12:00 min, pass@1 0.25 to 0.50 on 9 held-out items" in page
    assert "0.500<td>0.400 to 0.600" in page and page.count("class=mark") == page.count("<svg")
    assert "&lt;script&gt;alert" in page and "<script" not in page and "&lt;run&gt;" in page


def test_samples_are_of_different_prompts_the_best_reply_and_the_worst(run):
    """Right is what the accuracy reward says: in a group of right replies none is better than the others."""
    page = page_of(run)
    for step, when in ((1, "at the beginning"), (8, "at the end")):
        for item in "ab":
            place = page.index(f"Step {step}, {when}: {item}")
            assert page.index(f"ask {item}", place) < page.index("<pre class='right'>", place)
    assert page.count("<pre class='right'>") == page.count("<pre class='wrong'>") == 4
    all_right = [reply(1, "a", "<think>x</think>4", True) for _ in range(3)]
    (run / "completions.jsonl").write_text("\n".join(map(json.dumps, all_right)), encoding="utf-8")
    assert page_of(run).count("<pre class='right'>") == 1 and "<pre class='wrong'>" not in page_of(run)


def test_a_run_of_given_replies_and_one_that_has_just_begun_are_reported_too(run):
    steps = [{"step": n, "kind": "sft", "loss": 1 / n, "gradient": 1.0, "seconds": 2.0 * n} for n in range(1, 4)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"step": 4, "ki', encoding="utf-8")
    page = page_of(run)
    assert "3 steps of supervised fine-tuning in 6 s" in page and "<b>loss, nats a token</b>" in page
    (run / "log.jsonl").write_text(json.dumps(steps[0]), encoding="utf-8")
    (run / "config.toml").unlink()
    (run / "completions.jsonl").unlink()
    assert "1 step" in page_of(run) and "<svg" not in page_of(run)
    with pytest.raises(UserError, match="no run with a log"):
        write_report(run / "none", run / "x.html")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(run, run / "none" / "x.html")


def test_a_curve_of_many_points_has_a_smooth_line_over_them_and_a_flat_one_stays_on_the_page():
    noisy = draw("noise", [Line("", [(n, float(n % 2)) for n in range(100)])])
    assert noisy.count("<polyline") == 2 and "0.5" in noisy
    flat = draw("flat", [Line("", [(1, 0.0), (2, 0.0)])])
    assert flat.count("<polyline") == 1 and flat.count("class=grid") == 1 and "nan" not in flat
    assert draw("one point", [Line("", [(1, 1.0)])]) == ""


CONTRAST = """() => {
  const light = text => { const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(it => it / 255)
    .map(it => it <= 0.03928 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = node => { const colour = getComputedStyle(node).backgroundColor;
    return colour === 'rgba(0, 0, 0, 0)' ? behind(node.parentElement) : colour };
  const texts = [...document.querySelectorAll('h1, p, th, td, b, span, pre, summary, svg text')];
  return Math.min(...texts.map(node => { const style = getComputedStyle(node);
    const [a, b] = [light(node.tagName === 'text' ? style.fill : style.color), light(behind(node))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) })) }"""


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_on_a_narrow_screen_and_in_the_dark(run, browser, width, scheme):
    page_of(run)
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    reader = Reader(browser, (run / "page.html").as_uri(), is_open=False, **options)
    page = reader.page
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing stands out
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    assert dark == (scheme == "dark")
    assert page.evaluate(CONTRAST) >= 4.5
    figures = page.evaluate("[...document.querySelectorAll('figure')].map(it => it.getBoundingClientRect().width)")
    assert min(figures) >= 280
    assert reader.complaints == []
    reader.context.close()
