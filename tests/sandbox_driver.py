"""The sandbox, asked for by another user: a JSON line in, a JSON line out. Started by `test_train_sandbox.py`.

Imports nothing that the machine's own Python lacks. With `blind` the kernel refuses namespaces, as in a container.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from pathlib import Path

_UNSHARE = {"x86_64": 272, "aarch64": 97}
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM


def refuse_namespaces() -> None:
    """What Docker's own profile does: `unshare` is not permitted, here and to every child."""
    number = _UNSHARE[os.uname().machine]
    steps = [(_LOAD, 0, 0, 0), (_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert libc.prctl(_SECCOMP, _FILTER, program, 0, 0) == 0


def main() -> None:
    folder, mode = sys.argv[1:3]
    sys.path.insert(0, folder)
    if mode == "blind":
        refuse_namespaces()
    from stillhouse.r1.errors import UserError
    from stillhouse.train import rewards, sandbox

    calls = {
        "run": lambda source, stdin, limits: list(vars_of(sandbox.run_python(source, stdin, sandbox.Limits(*limits)))),
        "code": rewards.code,
        "read": lambda path: Path(path).read_text(encoding="utf-8"),
        "uid": os.getuid,
    }
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": calls[name](*arguments)}
        except UserError as error:
            answer = {"refused": [type(error).__name__, error.message, error.hint]}
        print(json.dumps(answer), flush=True)


def vars_of(outcome: object) -> list[object]:
    return [getattr(outcome, name) for name in ("code", "stdout", "stderr")]


if __name__ == "__main__":
    main()
