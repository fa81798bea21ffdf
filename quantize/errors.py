"""What can go wrong while quantizing, each with the exit code that `stillhouse quantize --help` tells."""

from __future__ import annotations

from ..r1.errors import UserError


class SourceInvalid(UserError):
    """The checkpoint is incomplete, damaged, of an unknown kind, or not what its checksum says."""

    exit_code = 3


class NoRoom(UserError):
    """The disk or the memory has less than the plan needs."""

    exit_code = 4


class QualityTooLow(UserError):
    """The file would be worse than what was asked for."""

    exit_code = 5


class VerificationFailed(UserError):
    """The file is not what it should be."""

    exit_code = 6
