"""The chat page in a real browser: what a person does there works, and nothing is asked of any other server."""

from __future__ import annotations

import json
import re

import httpx
import pytest
import server_fixtures as fixtures
from browser_fixtures import Reader

KEY = "sk-of-the-page"
THOUGHTS = " ".join(f"Of {n} I think, and of its square {n * n}." for n in range(40))  # no loop that would be broken
MARKDOWN = r"""script:So $a^2$ it is.</think>

# Title

It is **bold**, $x^2$, \(y_1\) and $$\frac{1}{2}$$ for $5 or $10, ~1 or ~2.

\[ \sum_{k=0}^{n} \binom{n}{k} = 2^n \]

```python
def four() -> int:
    return 4
```

| a | b |
|---|--:|
| 1 | 2 |

- one
- two
"""


@pytest.mark.slow
def test_thoughts_stream_and_fold_and_the_answer_comes(reader):
    page = reader.page
    reader.type(f"script:{THOUGHTS[:280]}</think>\n\nIt is **four**. " + "Yes. " * 40)
    page.locator(".thinking .thoughts[open]").wait_for()
    reader.until("document.querySelector('.thoughts .md').innerText.includes('Of 2 I think')")
    assert re.match(r"Thinking", page.locator(".thoughts summary").inner_text())
    page.locator(".answer strong").wait_for()  # long before the end
    assert page.locator("#stop").is_visible()
    reader.until("!document.querySelector('.thoughts').open")
    reader.done()
    assert reader.answer().startswith("It is four. Yes.")
    assert re.fullmatch(r"Thought for \d+(\.\d)? s · 28\d tokens", page.locator(".thoughts summary").inner_text())
    stats = page.locator(".assistant .stats").inner_text()
    assert re.fullmatch(r"\d\d\d tokens · [\d.]+ tokens/s · answer after [\d.]+ s", stats), stats
    page.locator("summary").click()
    assert page.locator(".thoughts .md").inner_text().startswith(THOUGHTS[:100])
    assert page.locator("#context-text").inner_text() != "0 / 4 096"


@pytest.mark.slow
def test_stop_keeps_what_there_is_and_continue_goes_on(reader):
    page = reader.page
    reader.type("script:hm</think>\n\n" + "word " * 300)
    reader.until("document.querySelector('.answer')?.innerText.length > 30")
    page.keyboard.press("Escape")
    reader.done()
    before = reader.answer()
    assert 30 <= len(before) < 1400
    assert page.locator(".notice").inner_text().startswith("Stopped.")
    reader.click("Continue")
    reader.until(f"document.querySelector('.answer').innerText.length > {len(before) + 20}")
    page.locator("#stop").click()
    reader.done()
    assert reader.answer().startswith(before)
    assert reader.focus() == "input"


@pytest.mark.slow
def test_answer_now_ends_the_thoughts(reader):
    page = reader.page
    reader.type(f"script:{THOUGHTS}</think>\n\nfour")
    reader.until("document.querySelector('.thoughts .md')?.innerText.length > 20")
    page.locator("#answer-now").click()
    reader.done()
    assert page.locator(".answer").inner_text()
    assert len(page.locator(".thoughts .md").text_content()) < 1100


@pytest.mark.slow
def test_what_is_cut_at_max_tokens_can_be_continued(reader):
    page = reader.page
    page.locator("#open-settings").click()
    page.locator("#s-max_tokens").fill("40")
    page.locator("#s-budget").fill("0")
    page.keyboard.press("Escape")
    assert page.locator("#effort").input_value() == "budget"
    reader.ask("One two three four five six seven eight nine ten eleven twelve.")
    assert page.locator(".notice").inner_text().startswith("Cut at max_tokens.")
    cut = reader.answer()
    reader.click("Continue")
    reader.done()
    assert reader.answer().startswith(cut)
    assert len(reader.answer()) > len(cut)
    assert page.locator(".assistant").count() == 1


@pytest.mark.slow
def test_edit_regenerate_and_the_versions_between(reader):
    page = reader.page
    reader.ask("first words")
    page.get_by_title("Edit and ask again").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("other words")
    page.keyboard.press("Enter")
    reader.until("document.querySelector('.bubble')?.innerText === 'other words'")
    reader.done()
    assert reader.answer() == "other words"
    assert page.locator(".user .versions").inner_text().split() == ["2/2"]
    page.locator(".user [title='Earlier version']").click()
    assert (page.locator(".bubble").inner_text(), reader.answer()) == ("first words", "first words")
    page.locator(".assistant [title='Answer again']").click()
    page.locator(".assistant .versions").wait_for()
    reader.done()
    assert page.locator(".assistant .versions").inner_text().split() == ["2/2"]


@pytest.mark.slow
def test_a_reload_finds_the_conversation_and_the_list_has_it(reader):
    page = reader.page
    reader.ask("remember me")
    page.reload()
    page.locator(".assistant .answer").wait_for()
    assert (page.locator(".bubble").inner_text(), reader.answer()) == ("remember me", "remember me")
    page.locator("#new").click()
    assert page.locator("#welcome").is_visible()
    assert page.locator("#examples button").count() == 3
    page.get_by_role("link", name="remember me").click()
    assert reader.answer() == "remember me"


@pytest.mark.slow
def test_a_reply_that_a_reload_cut_can_be_continued(reader):
    page = reader.page
    reader.type("script:hm</think>\n\n" + "word " * 800)
    reader.until("document.querySelector('.answer')?.innerText.length > 30")
    page.wait_for_timeout(1700)  # it is kept every 1.5 s
    page.reload()
    page.locator(".answer").wait_for()
    assert reader.answer().startswith("word word")
    page.get_by_role("button", name="Continue").wait_for()


@pytest.mark.slow
def test_rename_delete_and_undo(reader):
    page = reader.page
    reader.ask("call me something")
    page.locator(".entry a").focus()
    page.keyboard.press("F2")
    page.keyboard.type("Ishmael")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Ishmael").wait_for()
    assert page.title() == "Ishmael · Stillhouse"
    page.locator(".entry .round").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.locator("#welcome").wait_for()
    assert page.locator(".entry").count() == 0
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("link", name="Ishmael").wait_for()
    page.locator(".bubble").wait_for()


@pytest.mark.slow
def test_export_and_import_give_the_same_conversation(reader, tmp_path):
    page = reader.page
    reader.ask("script:hm</think>\n\n**four**")
    files = {}
    for name in ("Export as Markdown", "Export as JSON"):
        page.locator(".entry .round").click()
        with page.expect_download() as download:
            page.get_by_role("menuitem", name=name).click()
        files[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[name])
    text = files["Export as Markdown"].read_text(encoding="utf-8")
    assert "## You" in text and "## echo" in text and "<summary>Thoughts</summary>" in text and "**four**" in text
    data = json.loads(files["Export as JSON"].read_text(encoding="utf-8"))
    assert [node["content"] for node in data["conversations"][0]["nodes"].values()][1] == "**four**"
    page.locator("#file").set_input_files(files["Export as JSON"])
    reader.until("document.querySelectorAll('.entry').length === 2")
    assert (reader.answer(), page.locator(".answer strong").count()) == ("four", 1)
    openai = tmp_path / "openai.json"
    openai.write_text(json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]))
    page.locator("#file").set_input_files(openai)
    reader.until("document.querySelector('.answer').innerText === 'ho'")
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1}')
    page.locator("#file").set_input_files(broken)
    page.get_by_text("broken.json is not imported: it holds neither conversations nor messages.").wait_for()


@pytest.mark.slow
def test_markdown_code_and_formulas_are_drawn(reader):
    page = reader.page
    reader.ask(MARKDOWN)
    answer = page.locator(".answer")
    assert answer.locator("h1").inner_text() == "Title"
    assert answer.locator(".katex").count() == 4
    assert answer.locator(".katex-display").count() == 2
    assert "$5 or $10, ~1 or ~2." in answer.inner_text()
    page.locator(".hljs-keyword").first.wait_for()
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    assert answer.locator("td").last.evaluate("cell => getComputedStyle(cell).textAlign") == "right"
    reader.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reader.click("Copy")
    page.locator(".copy-code").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("def four()")


@pytest.mark.slow
def test_what_grew_looks_as_what_is_drawn_at_once(reader):
    """Only the last blocks are read again while a text grows; the result must not tell."""
    page = reader.page
    reader.ask(MARKDOWN + "\n\n1. a\n\n   b\n2. c\n\n> d\n> e\n\nf\n\n***\n\n- [x] g\n" + "\n\npar" * 5)
    page.locator(".hljs-keyword").first.wait_for()
    grown = page.locator(".answer").inner_html()
    page.reload()
    page.locator(".hljs-keyword").first.wait_for()
    assert page.locator(".answer").inner_html() == grown


EVIL = """
<img src=x onerror="document.title='evil'"><script>document.title='evil'</script>
<iframe src="javascript:document.title='evil'"></iframe><svg onload="document.title='evil'">
<style>body { display: none }</style><form action="http://evil.example"><input name=a></form>

[click](javascript:document.title='evil') [data](data:text/html,evil) ![pixel](http://evil.example/p.png)
<a href="java&#115;cript:document.title='evil'">a</a> <math><mi xlink:href="javascript:alert(1)">m</mi></math>

$\\href{javascript:alert(1)}{x}$ $\\htmlStyle{position:fixed}{y}$ $\\includegraphics{http://evil.example/p.png}$

```"><img src=x onerror=alert(1)>
code
```
"""


@pytest.mark.slow
def test_what_a_model_writes_stays_text(reader):
    page = reader.page
    reader.ask(f"script:{EVIL}</think>\n\n{EVIL}")
    page.locator("summary").click()
    page.locator(".thoughts .md p").first.wait_for()
    for place in (".answer", ".thoughts .md"):
        inside = page.locator(place)
        assert inside.locator("img, script, iframe, style, form, input, object, embed, base, meta").count() == 0
        hrefs = [link.get_attribute("href") for link in inside.locator("a").all()]
        assert hrefs == ["http://evil.example/p.png"], place
        handlers = "e => [...e.querySelectorAll('*')].flatMap(x => x.getAttributeNames()).filter(n => /^on/.test(n))"
        assert inside.evaluate(handlers) == []
        assert "<img src=x" in inside.inner_text()
    page.reload()
    page.locator(".answer").wait_for()
    assert "evil" not in page.title().replace("script:", "").split("·")[1]


@pytest.mark.slow
def test_errors_are_told_as_they_are(browser, slow_echo):
    reader = Reader(browser, slow_echo)
    page = reader.page
    page.locator("#open-settings").click()
    page.locator("#s-temperature").fill("9")
    page.keyboard.press("Escape")
    reader.ask("hello")
    words = httpx.post(
        f"{slow_echo}/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "temperature": 9}
    ).json()["error"]["message"]
    assert page.locator(".notice.bad span").inner_text() == words
    page.locator("#open-settings").click()
    page.locator("#reset").click()
    page.keyboard.press("Escape")
    reader.click("Try again")
    reader.done()
    assert reader.answer() == "hello"
    assert reader.complaints == ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]
    reader.context.close()


@pytest.mark.slow
def test_a_key_is_asked_for_where_one_is_wanted(browser, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with fixtures.Process("--api-key-file", str(keys)) as process:
        reader = Reader(browser, process.url, is_open=False)
        reader.page.locator("#key[open]").wait_for()
        assert reader.page.locator("#key-words").inner_text() == "This server wants an API key."
        reader.page.locator("#key-input").fill(KEY)
        reader.page.locator("#key-keep").check()
        reader.page.keyboard.press("Enter")
        reader.until("document.querySelector('#model').value === 'echo'")
        assert reader.page.evaluate("localStorage.getItem('stillhouse.key')") == KEY
        reader.ask("hello")
        assert reader.answer() == "hello"
        assert [text for text in reader.complaints if "401" not in text] == []
        reader.context.close()


@pytest.mark.slow
def test_a_server_that_goes_away_is_told_and_what_came_is_kept(browser):
    with fixtures.Process(step_s=0.02) as process:
        reader = Reader(browser, process.url)
        reader.type(f"script:hm</think>\n\n{THOUGHTS}")
        reader.until("document.querySelector('.answer')?.innerText.length > 10")
        process.end()
        reader.done()
        assert reader.page.locator(".notice.bad span").inner_text() == "the connection to the server was lost"
        assert reader.answer().startswith("Of 0 I")
        reader.until("document.querySelector('#banner').innerText === 'the server does not answer'")
        assert [text for text in reader.complaints if "ERR_" not in text] == []
        reader.context.close()


@pytest.mark.slow
def test_a_reply_goes_on_while_another_conversation_is_shown(reader):
    page = reader.page
    reader.type(f"script:hm</think>\n\n{THOUGHTS[:600]}")
    reader.until("document.querySelector('.answer')?.innerText.length > 10")
    page.locator("#new").click()
    reader.ask("something else")
    assert reader.answer() == "something else"
    page.locator(".entry a").last.click()
    page.get_by_text("script:hm").first.wait_for()
    reader.done()
    assert reader.answer() == THOUGHTS[:600].strip()


@pytest.mark.slow
def test_everything_can_be_done_with_the_keyboard(reader):
    page = reader.page
    assert reader.focus() == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    reader.done()
    assert page.locator(".bubble").inner_text() == "one\ntwo"
    assert reader.focus() == "input"
    page.locator("#new").focus()
    order = []
    for _ in range(16):
        order.append(reader.focus())
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle !== 'none'") or order[-1] == "input"
        page.keyboard.press("Tab")
    wanted = ["new", "one two", "More about one two", "import", "export-all", "toggle-list", "model", "theme"]
    assert [name for name in order if name in wanted] == wanted
    assert {"open-settings", "Copy", "Edit and ask again", "Answer again", "input", "effort"} <= set(order)
    page.keyboard.press("Control+Shift+O")
    assert (reader.focus(), page.locator("#welcome").is_visible()) == ("input", True)
    assert "one" in page.locator("#list").inner_text()


@pytest.mark.slow
def test_scrolling_up_is_respected_while_a_reply_comes(reader):
    page = reader.page
    reader.type("script:hm</think>\n\n" + "A line.\n\n" * 90)
    gap = "(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.querySelector('#scroll'))"
    reader.until("document.querySelector('#scroll').scrollTop > 200")
    assert page.evaluate(gap) < 60
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -150)
    page.wait_for_timeout(100)
    top = page.evaluate("document.querySelector('#scroll').scrollTop")
    page.wait_for_timeout(300)
    assert page.evaluate("document.querySelector('#scroll').scrollTop") == top
    page.locator("#to-end").click()
    reader.done()
    assert page.evaluate(gap) < 5


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(browser, slow_echo, scheme):
    reader = Reader(browser, slow_echo, color_scheme=scheme)
    lightness = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3))"
    assert (reader.page.evaluate(lightness) > 128) == (scheme == "light")
    for chosen in ("light", "dark"):
        reader.page.locator("#theme").click()
        assert (reader.page.evaluate(lightness) > 128) == (chosen == "light")
    reader.page.reload()
    assert reader.page.evaluate(lightness) < 128
    assert reader.complaints == []
    reader.context.close()


@pytest.mark.slow
def test_it_fits_a_phone(browser, slow_echo):
    reader = Reader(browser, slow_echo, viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    page = reader.page
    page.locator("#input").fill(MARKDOWN + "\n" + "averylongword" * 30)
    page.locator("#send").click()
    reader.done()
    widths = "[...document.querySelectorAll('html, #scroll, header, #composer')].map(e => e.scrollWidth)"
    assert max(page.evaluate(widths)) <= 360
    page.locator("#toggle-list").click()
    page.locator("#new").click()
    page.locator("#welcome").wait_for()
    reader.until("getComputedStyle(document.querySelector('#sidebar')).visibility === 'hidden'")
    assert reader.complaints == []
    reader.context.close()


SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""


@pytest.mark.slow
def test_nothing_jumps_while_the_page_loads_or_an_answer_comes(reader):
    """In Chromium's own measure, in which 0.1 is good."""
    reader.context.add_init_script(SHIFTS)
    reader.ask("A first question")
    reader.page.reload()
    reader.page.locator(".answer").wait_for()
    assert reader.page.evaluate("window.shifted") < 0.05
    reader.ask("script:hm</think>\n\n" + "A line.\n\n" * 30)
    assert reader.page.evaluate("window.shifted") < 0.1


# Tools and forms

TOOL = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def set_text(reader: Reader, name: str, text: str) -> None:
    reader.page.locator("#open-settings").click()
    reader.page.locator(f"#s-{name}").fill(text)
    reader.page.keyboard.press("Escape")


@pytest.mark.slow
def test_calls_are_shown_folded_and_their_results_go_back(reader):
    page = reader.page
    set_text(reader, "tools", json.dumps([TOOL]))
    assert page.locator("#in-use").inner_text() == "Tools"
    reader.ask(f"script:hm</think>\n\nI look.\n{CALL}\n{CALL.replace('Oslo', 'Rome')}")
    calls = page.locator(".asked")
    assert calls.locator("b").all_inner_texts() == ["get_weather"] * 2
    assert calls.locator(".line").all_inner_texts() == ['{"city": "Oslo"}', '{"city": "Rome"}']
    assert (reader.answer(), page.locator("details.call[open]").count()) == ("I look.", 0)
    calls.first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert calls.first.locator("code").inner_text() == '{\n  "city": "Oslo"\n}'
    fields = page.get_by_label("Result of get_weather")
    fields.first.fill("4 degrees")
    page.keyboard.press("Enter")
    page.keyboard.type('{"degrees": 17}')
    page.keyboard.press("Enter")
    page.locator(".returned").last.wait_for()
    reader.done()
    assert page.locator(".returned .line").all_inner_texts() == ["4 degrees", '{"degrees": 17}']
    assert "<tool_response>\n4 degrees\n</tool_response>" in reader.answer()  # an echo says what it was told
    assert page.locator(".results").count() == 0
    page.reload()
    page.locator(".returned").last.wait_for()
    assert (page.locator(".asked").count(), page.locator(".returned").count()) == (2, 2)


@pytest.mark.slow
def test_conversations_with_calls_are_exported_and_imported(reader, tmp_path):
    page = reader.page
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "How is it in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "snow"},
        {"role": "assistant", "content": "It snows."},
    ]
    openai, ours = tmp_path / "openai.json", tmp_path / "ours.json"
    openai.write_text(json.dumps(messages))
    page.locator("#file").set_input_files(openai)
    reader.until("document.querySelector('.returned b')?.innerText === 'get_weather'")
    assert reader.answer() == "It snows."
    for name in ("Export as Markdown", "Export as JSON"):
        page.locator(".entry .round").click()
        with page.expect_download() as download:
            page.get_by_role("menuitem", name=name).click()
        download.value.save_as(ours)
        if name == "Export as Markdown":
            text = ours.read_text(encoding="utf-8")
            assert "Calls `get_weather`:" in text and "## Result of get_weather\n\nsnow" in text
    page.locator("#file").set_input_files(ours)
    reader.until("document.querySelectorAll('.entry').length === 2")
    assert page.locator(".asked .line").inner_text() == '{"city": "Oslo"}'


@pytest.mark.slow
def test_an_answer_can_be_held_to_a_schema_and_a_broken_one_is_told(reader):
    page = reader.page
    set_text(reader, "schema", '{"enum": ["yes"')
    reader.ask("Is it?")
    assert "the schema is no JSON" in page.locator(".notice.bad").inner_text()
    set_text(reader, "schema", '{"enum": ["yes"]}')
    assert page.locator("#in-use").inner_text() == "JSON"
    reader.click("Try again")
    reader.done()
    assert reader.answer() == '"yes"'


@pytest.mark.slow
def test_all_parameters_reach_the_server(reader):
    page = reader.page
    asked = []
    page.on("request", lambda request: asked.append(request.post_data) if "completions" in request.url else None)
    numbers = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 7}
    page.locator("#open-settings").click()
    for name, value in (numbers | {"max_tokens": 50}).items():
        page.locator(f"#s-{name}").fill(str(value))
    page.locator("#s-system").fill("Be brief.")
    page.keyboard.press("Escape")
    reader.ask("hello")
    body = json.loads(asked[0])
    assert {name: body[name] for name in numbers} == numbers
    assert (body["max_tokens"], body["messages"][0]) == (50, {"role": "system", "content": "Be brief."})
