"""The chat page: what is served, that nothing of it comes from elsewhere, and that it works in a real browser.

The tests in the browser want Python's `playwright` and a Chromium on the PATH (or named by STILLHOUSE_CHROMIUM):
`pip install playwright`, `apt install chromium`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from stillhouse.server.page import FOLDER
from stillhouse.server.settings import key_hash

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

sys.path.insert(0, str(Path(__file__).parent))
import server_fixtures as fixtures

KEY = "sk-of-the-page"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
OURS = [path for path in FILES if "vendor" not in path.relative_to(FOLDER).parts]
VENDORED = [path for path in FILES if path not in OURS]
NAMESPACES = ("http://www.w3.org/1998/Math/MathML", "http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg")


def name_of(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


@pytest.fixture(scope="module")
def server():
    with fixtures.in_process() as server:
        yield server


def policy(response: httpx.Response) -> dict[str, str]:
    """The Content-Security-Policy, by directive."""
    parts = response.headers["content-security-policy"].split("; ")
    return {name: rest for name, _, rest in (part.partition(" ") for part in parts)}


# What is served


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_is_served_as_what_it_is(server, path):
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    response = server.get(f"/page/{name_of(path)}")
    assert (response.status_code, response.content) == (200, path.read_bytes())
    kind = types.get(path.suffix, {".woff2": "font/woff2"}.get(path.suffix, "text/plain"))
    assert response.headers["content-type"].split(";")[0] == kind
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_at_the_root(server):
    response = server.get("/")
    assert response.text == (FOLDER / "index.html").read_text(encoding="utf-8")
    assert server.request("HEAD", "/").status_code == 200
    assert response.headers["referrer-policy"] == "no-referrer"


def test_the_policy_lets_nothing_in_from_elsewhere_and_nothing_inline(server):
    rules = policy(server.get("/"))
    assert rules["default-src"] == "'none'"
    assert {rules[f"{kind}-src"] for kind in ("script", "style", "font", "img", "connect")} == {"'self'"}
    assert {rules[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert (rules["require-trusted-types-for"], rules["trusted-types"]) == ("'script'", "dompurify")
    assert policy(server.get("/page/app.js")) == rules


def test_the_index_holds_no_script_style_or_handler_of_its_own():
    class Inline(HTMLParser):
        found: list[str] = []  # noqa: RUF012
        inside = ""

        def handle_starttag(self, tag, attrs):
            self.inside = tag
            self.found += [f"{tag} {name}" for name, _ in attrs if name.startswith("on") or name == "style"]

        def handle_data(self, data):
            if self.inside in ("script", "style") and data.strip():
                self.found.append(self.inside)

    Inline().feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    assert Inline.found == []


def test_our_files_are_asked_for_again_and_cost_nothing_if_they_are_the_same(server):
    first = server.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = server.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]


def test_vendored_files_are_kept_by_the_browser(server):
    assert "immutable" in server.get(f"/page/{name_of(VENDORED[0])}").headers["cache-control"]
    unversioned = [name_of(path) for path in VENDORED if not re.fullmatch(r"[a-z]+-\d+\.\d+\.\d+", _folder(path))]
    assert not unversioned


def test_text_is_sent_compressed_to_who_can_read_it(server):
    zipped = server.get("/page/app.js", headers={"accept-encoding": "gzip"})
    plain = server.get("/page/app.js", headers={"accept-encoding": "identity"})
    assert (zipped.headers["content-encoding"], zipped.text) == ("gzip", plain.text)
    assert "content-encoding" not in plain.headers
    font = next(path for path in FILES if path.suffix == ".woff2")
    assert "content-encoding" not in server.get(f"/page/{name_of(font)}").headers


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/nothing.js",
        "/page/../page.py",
        "/page/..%2fpage.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
    ],
)
def test_what_is_no_file_of_the_page_is_not_found(server, path):
    assert server.get(path).status_code == 404


def test_the_page_needs_no_key_and_the_api_does():
    with fixtures.in_process(key_hashes=frozenset({key_hash(KEY)})) as server:
        assert [server.get(path).status_code for path in ("/", "/page/app.js")] == [200, 200]
        assert [server.get(path).status_code for path in ("/v1/models", "/metrics", "/page")] == [401, 401, 401]
        assert [server.request("POST", path).status_code for path in ("/", "/page/app.js")] == [401, 401]


def test_a_web_page_by_another_name_gets_nothing(server):
    assert server.get("/", headers={"host": "evil.example"}).status_code == 403


# What lies in the folder


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix in (".js", ".css", ".html", ".svg")], ids=name_of
)
def test_no_file_names_an_address_elsewhere(path):
    text = path.read_text(encoding="utf-8")
    for namespace in NAMESPACES:
        text = text.replace(namespace, "")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = text.replace("https?:|mailto:", "")  # the page's rule for links
    known = ("https://github.com/highlightjs/", "https://github.com/markedjs/marked", "https://github.com/babel/")
    found = [
        url
        for url in re.findall(r"(?:https?|wss?|ftp)://[^\s\"'`<>)]*|url\(\s*[\"']?//[^)]*", text)
        # In messages for programmers, or the beginning that is put before `www.` links.
        if not (path in VENDORED and (url.startswith(known) or url == "http://"))
    ]
    assert not found


def test_what_the_files_name_is_there():
    missing = []
    for path in FILES:
        if path.suffix not in (".html", ".css", ".js"):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".html":
            base, names = FOLDER.parent, re.findall(r'(?:src|href)="(page/[^"]+)"', text)
        elif path.suffix == ".css":
            base, names = path.parent, re.findall(r"url\(([^)]+)\)", text)
        else:
            base, names = path.parent, re.findall(r'(?:from|import\()\s*"(\./[^"]+)"', text)
        missing += [f"{name_of(path)}: {name}" for name in names if not (base / name).is_file()]
    languages = re.findall(r'[\w+"]+: "([a-z]+)"', (FOLDER / "render.js").read_text().partition("};")[0])
    folder = next(FOLDER.glob("vendor/highlight-*"))
    missing += [name for name in set(languages) if not (folder / f"{name}.min.js").is_file()]
    assert len(languages) > 20
    assert not missing


def test_every_vendored_library_has_its_licence():
    folders = [path for path in (FOLDER / "vendor").iterdir() if path.is_dir()]
    assert {folder.name.rpartition("-")[0] for folder in folders} == {"dompurify", "highlight", "katex", "marked"}
    for folder in folders:
        assert re.search("licen[cs]e", (folder / "LICENSE").read_text(encoding="utf-8"), re.IGNORECASE), folder.name


def test_every_file_is_packaged():
    project = tomllib.loads((FOLDER.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["stillhouse.server"]
    names = [path.relative_to(FOLDER.parent).as_posix() for path in FILES]
    # setuptools reads `**` as any number of folders, none too.
    flat = [pattern.replace("**/", "") for pattern in patterns]
    assert not [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in flat)]


def test_the_page_stays_small():
    import gzip

    assert sum(len(gzip.compress(path.read_bytes())) for path in OURS) < 32_000  # bytes on the wire
    assert sum(path.stat().st_size for path in OURS) < 90_000
    assert sum(path.stat().st_size for path in VENDORED) < 800_000


def _folder(path: Path) -> str:
    return path.relative_to(FOLDER / "vendor").parts[0]


# In a real browser

CHROMIUM = os.environ.get("STILLHOUSE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",  # containers have no user namespaces
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STEP_S = 0.004


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="wants Python's playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("wants Chromium: apt install chromium, or name one in STILLHOUSE_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def slow_echo():
    with fixtures.Process(step_s=STEP_S) as process:
        yield process.url


class Reader:
    """Somebody at the page, who also looks into the console and at the network."""

    def __init__(self, browser, url: str, *, is_open: bool = True, **options) -> None:
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: message.type in ("error", "warning") and self._complain(message.text))
        self.page.on("pageerror", lambda error: self._complain(f"uncaught: {error}"))
        self.page.on("dialog", lambda dialog: (self._complain(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self._looked_at(request.url))
        self.page.goto(url)
        if is_open:
            self.until("document.querySelector('#model').value !== ''")

    def _complain(self, text: str) -> None:
        self.complaints.append(text)

    def _looked_at(self, url: str) -> None:
        if not url.startswith((self.url, "blob:")):
            self._complain(f"a request went to {url}")

    def until(self, expression: str) -> None:
        """Wait until JavaScript says so. (`wait_for_function` would use `eval`, which the page's policy forbids.)"""
        assert fixtures.within(15, lambda: self.page.evaluate(expression)), expression

    def type(self, text: str) -> None:
        self.page.locator("#input").fill(text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> None:
        """Ask, and wait for the whole reply."""
        self.type(text)
        self.done()

    def done(self) -> None:
        self.page.locator("#stop").wait_for(state="hidden")
        self.until("!document.querySelector('.live')")

    def answer(self) -> str:
        return self.page.locator(".assistant .answer").last.inner_text()

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def focus(self) -> str:
        """What has the focus, by its id or name."""
        return self.page.evaluate(
            "(e => e.id || e.getAttribute('aria-label') || e.textContent.trim())(document.activeElement)"
        )


@pytest.fixture
def reader(browser, slow_echo):
    reader = Reader(browser, slow_echo)
    yield reader
    assert reader.complaints == []
    reader.context.close()


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
|---|---|
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
