"""The inside of the sandbox: a program by itself that shuts every door behind it and then runs what it was given.

Started by `sandbox.py` with `python -I -S`; imports the standard library only. On standard input comes the length of
the source, a newline, the source, and then the program's own input. It says `ready` on standard error when every door
is shut, and runs nothing if one cannot be.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable

_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = (
    *(0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000),
)
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_ALL_NEW = _NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NET | _NEW_IPC | _NEW_UTS
_DETACH = 2
_NO_NEW_PRIVILEGES, _DROP_BOUNDING, _DIE_WITH_PARENT, _SECURE_BITS = 38, 24, 1, 28
_SECURE = 0b101111  # root has no powers, keeps none, and none of this can be undone
_LAST_CAPABILITY = 40
_NOBODY = 65534
_SHOWN = ("/usr", "/lib", "/lib64", "/bin")  # of this machine, read-only
_ROOT = "/tmp"  # what the new root is built over, unseen by others

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Shut the doors, then become the program."""
    seconds, memory, disk, processes, open_files = (float(text) for text in sys.argv[1:6])
    source = _read(int(_read_line()))
    python = os.path.realpath(sys.executable)  # an environment of ours is not shown
    opened = _own_namespaces()
    child = os.fork()  # the first process of the new PID namespace
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _call("prctl", _DIE_WITH_PARENT, 9, 0, 0, 0)
    _own_root(opened, int(disk))
    _limit(seconds, memory, disk, processes, open_files)
    _give_up_powers()
    os.write(2, b"ready\n")
    program = os.fork()  # not the first process: signals and orphans are as everywhere
    if program:
        while True:
            ended, status = os.wait()
            if ended == program:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
    environment = {"PATH": "/usr/bin", "LANG": "C.UTF-8"}
    os.execve(python, [python, "-I", "-S", "-c", source.decode()], environment)


def _own_namespaces() -> list[tuple[str, int]]:
    """Leave the others; what is to be shown of this machine, opened while that is still allowed."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        # Root becomes nobody: a limit on processes does not hold for root. Only one outside may write such a map.
        ready, done = os.pipe(), os.pipe()
        helper = os.fork()
        if not helper:
            os.close(ready[1])
            if not os.read(ready[0], 1):  # refused
                os._exit(1)
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{os.getppid()}/{name}", f"0 {_NOBODY} 1")
            os.write(done[1], b".")
            os._exit(0)
        _call("unshare", _ALL_NEW)
        os.write(ready[1], b".")
        if os.read(done[0], 1) != b".":
            raise OSError("the user map could not be written")
        os.waitpid(helper, 0)
        os.setgroups([])
    else:
        _call("unshare", _ALL_NEW)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
    wanted = {os.path.realpath(path) for path in (sys.base_prefix, *_SHOWN) if os.path.isdir(path)}
    outer = [path for path in sorted(wanted) if not any(path.startswith(it + "/") for it in wanted)]
    opened = [(path, os.open(path, os.O_PATH)) for path in outer]
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    return opened


def _own_root(opened: list[tuple[str, int]], disk: int) -> None:
    """A root in memory with Python in it, and nothing of the old one."""
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", _ROOT, "tmpfs", _NO_SUID | _NO_DEVICES, f"size={disk},nr_inodes=4096,mode=755")
    for path, source in opened:
        os.makedirs(_ROOT + path, exist_ok=True)
        _mount(f"/proc/self/fd/{source}", _ROOT + path, None, _BIND)
        _mount("none", _ROOT + path, None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    for path in _SHOWN:  # /lib may be a link to /usr/lib
        if os.path.islink(path):
            os.symlink(os.readlink(path), _ROOT + path)
    os.makedirs(_ROOT + "/dev")
    for name in ("null", "urandom"):
        open(f"{_ROOT}/dev/{name}", "w").close()
        _mount(f"/dev/{name}", f"{_ROOT}/dev/{name}", None, _BIND)
    os.makedirs(_ROOT + "/tmp")
    os.makedirs(_ROOT + "/old")
    os.chdir(_ROOT)
    if _libc.syscall(_PIVOT_ROOT, b".", b"old"):
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")
    _call("umount2", b"/old", _DETACH)
    os.rmdir("/old")
    os.chmod("/tmp", 0o777)
    os.chdir("/tmp")


def _limit(seconds: float, memory: float, disk: float, processes: float, open_files: float) -> None:
    cpu = max(1, int(seconds + 0.999))
    limits = {
        resource.RLIMIT_AS: int(memory),
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: int(disk),
        resource.RLIMIT_NPROC: int(processes),
        resource.RLIMIT_NOFILE: int(open_files),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    os.closerange(3, 4096)


def _give_up_powers() -> None:
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for capability in range(_LAST_CAPABILITY + 1):
        _libc.prctl(_DROP_BOUNDING, capability, 0, 0, 0)  # those that the kernel does not know fail
    _call("prctl", _SECURE_BITS, _SECURE, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    return line


def _read(size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data))
    return data


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    coded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", coded[0], coded[1], coded[2], flags, coded[3])


def _call(name: str, *arguments: object) -> None:
    function: Callable[..., int] = getattr(_libc, name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[os.uname().machine]

if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(120)
