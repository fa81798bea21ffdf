"""The one family of errors that a user is meant to read.

A `UserError` is a sentence that says what is wrong and what the limit is, and a hint that says what to do. The command
line prints it without a traceback and exits with its `exit_code`; the server turns it into an OpenAI error object.
"""

from __future__ import annotations


class UserError(Exception):
    """What is wrong, in one sentence; `hint` says what to do about it."""

    exit_code = 2  # of the command line

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ModelNotFound(UserError):
    """No file, catalogue entry or hub repository has this name."""


class BadModelFile(UserError):
    """A model file is missing, cut short, malicious, or not of a kind that can be loaded."""


class BadPrompt(UserError):
    """A conversation that the model's template, or we, cannot turn into a prompt."""


class BadForm(UserError):
    """A form that cannot be kept; `part` is where in a schema, as keys joined by dots."""

    def __init__(self, message: str, part: str = "") -> None:
        super().__init__(message)
        self.part = part
