"""The chat page as it is served: which files there are, and that nothing of it comes from elsewhere."""

from __future__ import annotations

import fnmatch
import re
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

    assert sum(len(gzip.compress(path.read_bytes())) for path in OURS) < 36_000  # bytes on the wire
    assert sum(path.stat().st_size for path in OURS) < 105_000
    assert sum(path.stat().st_size for path in VENDORED) < 800_000


def _folder(path: Path) -> str:
    return path.relative_to(FOLDER / "vendor").parts[0]
