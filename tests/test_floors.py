"""Imports run down only: `r1 <- backends <- {server | quantize | train}`; heavy ones stay in their own file.

Read off the source with `ast`, so that a forbidden import is found even where no test runs it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

BELOW: dict[str, set[str]] = {  # floor -> the floors it may import, besides itself
    "r1": set(),
    "backends": {"r1"},
    "server": {"r1", "backends"},
    "quantize": {"r1", "backends"},
    "train": {"r1", "backends"},
}
FLOORS = [floor for floor in BELOW if (ROOT / floor / "__init__.py").is_file()]

WEB = ("server/*.py",)
HEAVY: dict[str, tuple[str, ...]] = {  # top-level module -> where it may be imported when the file is
    "llama_cpp": ("backends/llamacpp*.py", "quantize/gguf*.py"),
    "torch": ("backends/pytorch*.py", "quantize/pytorch*.py", "train/*.py"),
    "mlx": ("backends/mlxlm*.py", "quantize/mlxlm*.py"),
    "mlx_lm": ("backends/mlxlm*.py", "quantize/mlxlm*.py"),
    "transformers": ("backends/pytorch*.py", "quantize/pytorch*.py"),
    "huggingface_hub": (),
    "llguidance": (),
    "jinja2": (),
    "fastapi": WEB,
    "starlette": WEB,
    "uvicorn": WEB,
    "sse_starlette": WEB,
    "pydantic": WEB,
    "prometheus_client": WEB,
    "httpx": WEB,
}
RUNTIMES = ("llamacpp", "mlxlm", "pytorch")  # a backend's files begin with its name; `open.py` alone asks for them


class Import(NamedTuple):
    file: Path  # below ROOT
    line: int
    module: str  # "r1.prompt" for ours, from the root; "numpy.typing" for others
    ours: bool
    at_once: bool  # done when the file is imported, not later in a function

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def _imports(floors: list[str]) -> Iterator[Import]:
    for file in sorted(ROOT.glob("*.py")) + [f for floor in floors for f in sorted((ROOT / floor).rglob("*.py"))]:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        yield from _imports_in(tree, file.relative_to(ROOT), at_once=True)


def _imports_in(node: ast.AST, file: Path, *, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, False, at_once)
        elif isinstance(child, ast.ImportFrom):
            yield from _from(child, file, at_once)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports_in(child, file, at_once=False)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports_in(child, file, at_once=at_once and not is_function)


def _from(node: ast.ImportFrom, file: Path, at_once: bool) -> Iterator[Import]:
    if not node.level:
        assert node.module is not None
        yield Import(file, node.lineno, node.module, False, at_once)
        return
    folders = file.parent.parts
    assert node.level <= len(folders) + 1, f"{file}:{node.lineno} leaves the package"
    base = folders[: len(folders) + 1 - node.level] + tuple(node.module.split(".") if node.module else ())
    for alias in node.names:  # `from . import chat` names a file, `from .chat import f` does not; both begin alike
        yield Import(file, node.lineno, ".".join((*base, alias.name)), True, at_once)


IMPORTS = list(_imports(FLOORS))


def _floor(path: str) -> str | None:
    """The floor a dotted name or a file of ours is on; `None` for the root."""
    first = path.replace("/", ".").split(".")[0]
    return first if first in BELOW else None


def test_there_is_something_to_check():
    assert {"r1", "backends", "server"} <= set(FLOORS)
    assert sum(found.ours for found in IMPORTS) > 50


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_what_is_below_it(floor):
    wrong = [
        str(found)
        for found in IMPORTS
        if found.ours and _floor(found.file.as_posix()) == floor
        if (below := _floor(found.module)) is not None and below not in BELOW[floor] | {floor}
    ]
    assert not wrong


def test_a_floor_takes_nothing_from_the_root_but_the_version():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.ours and _floor(found.file.as_posix()) and _floor(found.module) is None
        if found.module != "__version__"
    ]
    assert not wrong


def test_inside_the_package_our_own_imports_are_relative():
    wrong = [str(found) for found in IMPORTS if not found.ours and found.module.split(".")[0] in {"stillhouse", *BELOW}]
    assert not wrong


def test_heavy_packages_are_imported_in_their_own_files_or_when_asked_for():
    wrong = [
        str(found)
        for found in IMPORTS
        if not found.ours and found.at_once and (places := HEAVY.get(found.module.split(".")[0])) is not None
        if not any(found.file.match(place) for place in places)
    ]
    assert not wrong


def test_only_open_chooses_a_runtime_and_only_when_asked_for():
    """A runtime's files may know each other; who else imports one loads it for everybody."""
    wrong = [
        str(found)
        for found in IMPORTS
        if found.ours and found.module.startswith("backends.")
        if found.module.split(".")[1].startswith(RUNTIMES)
        and not found.file.name.startswith((*RUNTIMES, "cluster_rank.py"))  # a rank is nothing but a runtime
        and (found.file.as_posix() != "backends/open.py" or found.at_once)
    ]
    assert not wrong


def test_the_command_line_answers_without_loading_anything_heavy():
    """Measured as modules, not as time: `stillhouse --help` has to stay under 0.3 s."""
    words = "import sys, stillhouse.__main__ as m; m.main(['--help']); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"numpy", *HEAVY}
