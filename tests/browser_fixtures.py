"""Somebody at the chat page, in a real headless Chromium.

Wants Python's `playwright` and a Chromium on the PATH (or named by STILLHOUSE_CHROMIUM): `pip install playwright`,
`apt install chromium`. Without them the tests are skipped.
"""

from __future__ import annotations

import os
import shutil

import pytest
import server_fixtures as fixtures

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
