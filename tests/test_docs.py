"""What the documents say is so: fields, paths, codes, metrics, flags, commands, links, sizes, snippets."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from stillhouse.__main__ import COMMANDS
from stillhouse.backends.base import LoadOptions
from stillhouse.backends.echo import Echo
from stillhouse.backends.engine import Engine
from stillhouse.r1.catalog import MODELS
from stillhouse.server import forms, others, schema, settings
from stillhouse.server.app import Service, create_app
from stillhouse.server.metrics import Metrics
from stillhouse.server.upstream import Upstream
from stillhouse.server.upstream_pool import Upstreams

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _code(text: str) -> str:
    """A page's code only: fenced blocks and `spans`."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", rest)])


def _blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for found, block in fenced if found == language]


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _request_models() -> list[type[BaseModel]]:
    homes = (schema, forms)
    classes = [kind for home in homes for _, kind in inspect.getmembers(home, inspect.isclass)]
    ours = {home.__name__ for home in homes}
    return [kind for kind in dict.fromkeys(classes) if issubclass(kind, BaseModel) and kind.__module__ in ours]


@pytest.mark.parametrize("kind", _request_models(), ids=lambda kind: kind.__name__)
def test_the_api_page_names_every_field(kind):
    words = set(re.findall(r"`(\w+)`", _read("docs/api.md")))
    assert not set(kind.model_fields) - words


def test_the_api_page_names_every_field_of_others():
    words = set(re.findall(r"`(\w+)`", _read("docs/api.md").partition("## Fields of others")[2].partition("## ")[0]))
    assert {*others.REFUSED, *others.MUST_BE_TRUE, *others.HARMLESS} <= words


def test_the_api_page_names_every_path_and_no_other():
    routes = create_app(Service(settings.Settings())).routes
    real = {re.sub(r":path\}", "}", route.path) for route in routes if hasattr(route, "methods")}
    told = set(re.findall(r"(?:GET|POST) (/[\w/{}.]*)", _read("docs/api.md")))
    assert told == real


def test_the_api_page_names_every_error_code():
    codes = set()
    for file in (ROOT / "server").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                codes.add(node.value.value)
    words = set(re.findall(r"`(\w+)`", _read("docs/api.md").partition("## Errors")[2]))
    assert len(codes) > 8 and not {code for code in codes if isinstance(code, str)} - words


class _Ranks:
    """A cluster's table, as far as metrics read it."""

    def table(self) -> dict[str, Any]:
        rank = {"rank": 0, "host": "here", "up": True}
        return {"groups": [{"group": 0, "epoch": 1, "last_step_age_s": 0.5, "ranks": [rank]}]}


def test_the_api_page_names_every_metric_and_no_other():
    metrics, engine = Metrics(), Engine(Echo())
    metrics.serve("echo", engine)
    upstream = Metrics()
    upstream.serve_upstreams("echo", Upstreams([Upstream("http://x", model=None, key=None, silence_s=1)], 1))
    cluster = Metrics()
    cluster.serve_cluster("echo", _Ranks())
    page = metrics.page().decode() + upstream.page().decode() + cluster.page().decode()
    engine.close()
    real = {name for name in re.findall(r"^# TYPE (\w+)", page, re.MULTILINE) if not name.endswith("_created")}
    told = set(re.findall(r"r1_\w+", _read("docs/api.md")))
    assert told == real
    assert set(re.findall(r"r1_\w+", _read("docs/operations.md"))) <= real


def test_the_operations_page_names_every_flag():
    parser = argparse.ArgumentParser(add_help=False)
    settings.add_model_flags(parser)
    settings.add_server_flags(parser)
    settings.add_upstream_flags(parser)
    real = set(re.findall(r"(?<!\w)--[a-z-]+", parser.format_help()))
    assert not real - set(re.findall(r"`(--[a-z-]+)`", _read("docs/operations.md")))


def test_the_operations_page_tells_the_real_defaults():
    page, parser = _read("docs/operations.md"), argparse.ArgumentParser()
    settings.add_model_flags(parser)
    settings.add_server_flags(parser)
    settings.add_upstream_flags(parser)
    given = vars(parser.parse_args([]))
    for flag in ("parallel", "kv_type", "batch_tokens", "host", "port", "max_body", "max_waiting", "grace"):
        (told,) = re.findall(rf"^\| `--{flag.replace('_', '-')}` \| `?([^`|]+?)`? \|", page, re.MULTILINE)
        assert told == format(given[flag], "g" if flag == "grace" else ""), flag
    assert LoadOptions().parallel == given["parallel"]


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_a_page_exist(name):
    code = _code(_read(name))
    assert not set(re.findall(r"(?:^|/|m )stillhouse ([a-z]+)\b", code, re.MULTILINE)) - COMMANDS.keys()
    targets = set(re.findall(r"^([a-z-]+):", _read("Makefile"), re.MULTILINE))
    assert not set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) - targets


@pytest.mark.parametrize("name", NAMES)
def test_links_in_a_page_lead_somewhere(name):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _read(name)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_python_in_a_page_compiles(name):
    for number, block in enumerate(_blocks(_read(name), "python")):
        compile(block, f"{name}, block {number}", "exec")


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_compiles_and_is_listed(example):
    compile(example.read_text(encoding="utf-8"), str(example), "exec")
    assert f"[{example.name}]({example.name})" in _read("examples/README.md")


def test_the_tutorials_backend_runs(capsys):
    """Word for word: what a reader copies has to work."""
    space: dict[str, object] = {"__name__": "tutorial"}
    for block in _blocks(_read("docs/backend-tutorial.md"), "python"):
        exec(compile(block, "backend-tutorial.md", "exec"), space)
    said = capsys.readouterr().out.rstrip("\n")
    assert 0 < len(said) <= 20 and set(said) <= set("the cat sat on the mat and the rat sat on the cat\ufffd")


def test_the_readme_tells_the_catalogues_sizes():
    readme = _read("README.md")
    for model in MODELS:
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{model.name}` |"))
        _, _, title, size, at_8k, at_32k, _ = (cell.strip() for cell in row.split("|"))
        kind, gb = model.gb[0]
        assert title.startswith(model.title)
        assert size == f"{gb} GB"
        assert at_8k == f"{model.memory_bytes(kind, 8192) / 1e9:.1f} GB"
        if model.context_length >= 32_768:
            assert at_32k == f"{model.memory_bytes(kind, 32_768) / 1e9:.1f} GB"


def test_the_readmes_tree_is_the_tree():
    (tree,) = (block for block in _blocks(_read("README.md"), "") if "__main__.py" in block)
    told = {word.rstrip("/") for line in tree.splitlines() for word in line[:27].split() if not word.startswith("`")}
    assert not [name for name in told if not (ROOT / name).exists()]
    packages = {init.parent.name for init in ROOT.glob("*/__init__.py")}
    assert packages <= told


def test_the_architecture_page_has_a_line_for_every_file():
    page = _read("docs/architecture.md")
    files = [file for init in ROOT.glob("*/__init__.py") for file in init.parent.glob("*.py")]
    assert not [f.relative_to(ROOT).as_posix() for f in files if f.name != "__init__.py" and f"`{f.name}`" not in page]
