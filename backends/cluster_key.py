"""The key that the processes of a cluster prove to one another: made for a run, or in a file that one user may read."""

from __future__ import annotations

import secrets
import stat
from pathlib import Path

from ..r1.errors import UserError
from .cluster_wire import KEY_BYTES

_MAKE = "make one: (umask 077; openssl rand -hex 32 > FILE), and copy it to every host"


def new_key() -> bytes:
    """A key for one run."""
    return secrets.token_bytes(KEY_BYTES)


def read_key(path: str) -> bytes:
    """The key in a file. Raises `UserError` where there is none, or where others may read it."""
    file = Path(path).expanduser()
    try:
        mode = file.stat().st_mode
        text = file.read_text()
    except FileNotFoundError:
        raise UserError(f"there is no key file {path}", _MAKE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the key file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"others may read the key file {path} (its mode is {mode & 0o777:o})", f"chmod 600 {path}")
    return parse_key(text, f"the key file {path}")


def parse_key(text: str, where: str) -> bytes:
    """A key as it is written down: 64 hexadecimal digits."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(f"{where} does not hold {2 * KEY_BYTES} hexadecimal digits", _MAKE)
    return key
