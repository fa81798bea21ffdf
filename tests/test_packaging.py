"""What is installed is what is here: packages, version, data files, the command. Nothing tells whose machine it was."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import stillhouse
from stillhouse.__main__ import COMMANDS, main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_PACKAGED = {"tests", "benchmarks", "examples", "docs", "deploy", "build", "dist"}


def _package_folders() -> dict[str, Path]:
    """Every folder of ours with an `__init__.py`, by its installed name."""
    found = {"stillhouse": ROOT}
    for init in ROOT.rglob("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts and parts[0] not in NOT_PACKAGED and not any(part.startswith(".") for part in parts):
            found[".".join(("stillhouse", *parts))] = init.parent
    return found


def _tracked() -> list[Path]:
    """The files that git has or would take; what is ignored is nobody's business."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def test_the_list_of_packages_equals_the_tree():
    """A folder that is missing from the list works in an editable install and is missing from the wheel."""
    assert sorted(SETUPTOOLS["packages"]) == sorted(_package_folders())


def test_every_file_that_the_code_reads_is_packaged():
    """Not only Python: a page, a template or a table needs a line in `[tool.setuptools.package-data]`."""
    data = SETUPTOOLS.get("package-data", {})
    packages = {name: folder for name, folder in _package_folders().items() if folder != ROOT}
    declared = {path for name, folder in packages.items() for glob in data.get(name, ()) for path in folder.glob(glob)}
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in _tracked()
        if path.suffix != ".py" and path not in declared and set(packages.values()) & set(path.parents)
    ]
    assert not missing


def test_the_root_holds_no_file_that_would_be_installed_by_accident():
    """The root is the package: a `setup.py` or `conftest.py` there would be part of it."""
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


def test_there_is_one_version():
    assert PROJECT["project"]["version"] == stillhouse.__version__


def test_the_console_script_is_main():
    (script,) = entry_points(group="console_scripts", name="stillhouse")
    assert script.value == PROJECT["project"]["scripts"]["stillhouse"]
    assert script.load() is main


def test_every_command_lies_in_a_module_that_is_there():
    missing = [module for module, _ in COMMANDS.values() if not (ROOT / f"{module.replace('.', '/')}.py").is_file()]
    assert not missing


def test_no_file_tells_whose_machine_it_was_written_on():
    ours = re.compile(r"(?<![\w.~])/(?:work|root|home/(?!stillhouse\b)\w+|Users/\w+)/\w")
    told = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        told += [f"{path.relative_to(ROOT)}: {found.group()}" for found in ours.finditer(text)]
    assert not told
