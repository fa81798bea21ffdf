"""The command line of quantizing: its flags are documented, its codes are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stillhouse.__main__ import main
from stillhouse.quantize import cli, errors
from stillhouse.quantize.progress import meter
from stillhouse.r1.clock import duration
from stillhouse.r1.errors import UserError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "quantize.md").read_text(encoding="utf-8")


def test_the_page_names_every_flag():
    real = set(re.findall(r"(?<![\w-])--[a-z-]+", cli.quantize_parser().format_help())) - {"--help"}
    assert len(real) > 12 and not real - set(re.findall(r"`(--[a-z-]+)`", PAGE))


@pytest.mark.parametrize("kind", [UserError, *vars(errors).values()])
def test_the_page_and_the_help_name_every_exit_code(kind):
    if isinstance(kind, type) and issubclass(kind, UserError):
        assert f"\n| {kind.exit_code} |" in PAGE
        assert re.search(rf"(?<!\d){kind.exit_code} ", cli.CODES)


@pytest.mark.parametrize("command", ("quantize", "verify"))
def test_help_is_given_without_loading_anything(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "exit codes:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.2, "4 s"), (59.6, "1:00 min"), (75, "1:15 min"), (7300, "2:01 h"), (3599.7, "1:00 h")]
)
def test_a_time_is_told_as_people_say_it(seconds, said):
    assert duration(seconds) == said


def test_off_a_terminal_progress_is_two_lines(capsys):
    with meter("writing", 10, "w") as show:
        show(10)
    assert capsys.readouterr().err.splitlines() == ["writing", "  done in 0 s"]
