"""The flags of a command. A bad one is an error like any other: one sentence, and what to do."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .errors import UserError


class Flags(argparse.ArgumentParser):
    """A parser that raises a `UserError` where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint, with the way to the list of flags."""
        raise UserError(message, f"{self.prog} --help tells what there is")


def flags_of(command: str, description: str, examples: str = "") -> Flags:
    """The parser of `stillhouse COMMAND`, with examples below its flags."""
    return Flags(
        prog=f"stillhouse {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
