"""Twelve ways out of the sandbox, all shut, for root and for a user without powers; nothing runs where they are not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from stillhouse.r1.errors import UserError
from stillhouse.train import sandbox
from stillhouse.train.rewards import code as code_reward
from stillhouse.train.rewards import program_in
from stillhouse.train.sandbox import Limits, Outcome, SandboxMissing, run_python

QUICK = Limits(seconds=1.0, memory=256 << 20, disk=1 << 20, processes=8)
STRANGER = 54_321  # a user that this machine does not know
DRIVER = Path(__file__).with_name("sandbox_driver.py")


class Here:
    """The sandbox as this process asks for it."""

    pid, uid = os.getpid(), os.getuid()
    run = staticmethod(run_python)
    code = staticmethod(code_reward)

    def read(self, path: Path) -> str:
        return path.read_text(encoding="utf-8")


class Stranger:
    """The sandbox as a user without powers asks for it, through `sandbox_driver.py`."""

    uid = STRANGER

    def __init__(self, folder: Path, mode: str = "") -> None:
        """Skips the test, with the reason, where this machine does not let us be somebody else."""
        if os.getuid() != 0:
            pytest.skip("only root can become another user")
        if (setpriv := shutil.which("setpriv")) is None:
            pytest.skip("setpriv is not installed: apt install util-linux")
        (folder / "stillhouse").symlink_to(Path(sandbox.__file__).parents[1])
        shutil.copy(DRIVER, folder)
        me = [f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--inh-caps=-all"]
        environment = {"PATH": os.environ["PATH"], "HF_TOKEN": "hunter2"}
        for python in dict.fromkeys((os.path.realpath(sys.executable), "/usr/bin/python3")):
            self.process = subprocess.Popen(
                [setpriv, *me, "/bin/sh", "-c", f"exec {python} -B {folder / DRIVER.name} {folder} {mode!r}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                text=True,
                cwd="/",
            )
            self.pid = self.process.pid
            try:
                assert self._ask("uid") == STRANGER
                return
            except (BrokenPipeError, ValueError):
                words = self.process.communicate()[1].strip().splitlines()
        pytest.skip(f"no Python here that another user may run: {words[-1:]}")

    def run(self, source: str, stdin: str = "", limits: Limits = QUICK) -> Outcome:
        return Outcome(*self._ask("run", source, stdin, astuple(limits)))

    def code(self, completions: list[str], tests: list[list[dict[str, str]]]) -> list[float]:
        return self._ask("code", completions, tests)

    def read(self, path: Path) -> str:
        return self._ask("read", str(path))

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "refused" in answer:
            kind, message, hint = answer["refused"]
            raise {"SandboxMissing": SandboxMissing}.get(kind, UserError)(message, hint)
        return answer["value"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that everybody may read: those of pytest are for one user."""
    path = Path(tempfile.mkdtemp(prefix="stillhouse-sandbox-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module", params=["this user", "a user without powers"])
def box(request, folder) -> Iterator[Here | Stranger]:
    """Whoever asks for a sandbox. Skips where there is no isolation to be had."""
    if request.param == "this user":
        it: Here | Stranger = Here()
    else:
        it = Stranger(folder)
        request.addfinalizer(it.close)
    try:
        it.run("")
    except SandboxMissing as error:
        pytest.skip(str(error))
    yield it


@pytest.fixture
def theirs(box) -> Iterator[Path]:
    """A folder that belongs to whoever asks."""
    path = Path(tempfile.mkdtemp(prefix="stillhouse-sandbox-"))
    (path / "secret").write_text("hunter2")
    for it in (path, path / "secret"):
        os.chown(it, box.uid, -1)
    assert box.read(path / "secret") == "hunter2"  # out here
    yield path
    shutil.rmtree(path)


def said(box: Here | Stranger, source: str, stdin: str = "", limits: Limits = QUICK) -> str:
    outcome = box.run(source, stdin, limits)
    return outcome.stdout.strip() or f"{outcome.code}: {outcome.stderr.strip()}"


def attempt(box: Here | Stranger, action: str) -> str:
    return said(
        box, f"import os\ntry:\n    {action}\n    print('out')\nexcept BaseException as e:\n    print(type(e).__name__)"
    )


def test_a_program_reads_its_input_and_prints(box):
    assert said(box, "print(sum(map(int, input().split())))", "17 25") == "42"
    assert box.run("import sys; sys.exit(3)").code == 3
    assert "ZeroDivisionError" in box.run("1/0").stderr


def test_1_the_network_is_not_there(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert attempt(box, f"import socket; socket.create_connection(('127.0.0.1', {port}), 0.5)") == "OSError"


def test_2_a_fork_bomb_stays_small_and_ends(box):
    source = "import os, time\ncount = 0\ntry:\n    for _ in range(200):\n"
    source += "        os.fork() or os._exit(time.sleep(9))\n        count += 1\n"
    source += "except OSError:\n    print('stopped', count < 20)"
    assert said(box, source) == "stopped True"


def test_3_memory_ends_before_the_machines_does(box):
    assert attempt(box, "x = bytearray(1 << 30)") == "MemoryError"


def test_4_the_disk_cannot_be_filled(box):
    assert attempt(box, "[open(f'/tmp/{n}', 'wb').write(bytes(500_000)) for n in range(50)]") == "OSError"


def test_5_an_endless_loop_ends(box):
    started = time.monotonic()
    assert box.run("while True: pass", limits=QUICK).code != 0
    assert box.run("import time; time.sleep(60)", limits=QUICK).timed_out
    assert time.monotonic() - started < 20


def test_6_files_of_this_machine_are_not_seen(box, theirs):
    assert attempt(box, f"print(open({str(theirs / 'secret')!r}).read())") == "FileNotFoundError"
    assert attempt(box, "os.listdir('/home')") == attempt(box, "os.listdir('/etc')") == "FileNotFoundError"


def test_7_secrets_in_the_environment_are_not_seen(box, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    assert said(box, "import os; print(sorted(os.environ))") == "['LANG', 'PATH']"
    assert attempt(box, "open('/proc/1/environ')") == attempt(box, "open('/proc/self/environ')") == "FileNotFoundError"


def test_8_nothing_is_written_outside(box, theirs):
    assert attempt(box, f"open({str(theirs / 'x')!r}, 'w')") == "FileNotFoundError"
    assert attempt(box, "import sys; open(sys.prefix + '/x', 'w')") == "OSError"
    assert attempt(box, "open('/usr/x', 'w')") == "OSError"
    assert attempt(box, "open('/tmp/x', 'w').write('here it may'); assert not os.path.exists('/tmp/y')") == "out"
    assert said(box, "import os; print(os.listdir('/tmp'))") == "[]"  # and it is gone


def test_9_no_process_outside_can_be_killed(box):
    assert attempt(box, f"os.kill({box.pid}, 9)") == "ProcessLookupError"
    box.run("import os; os.kill(-1, 9)", limits=QUICK)
    box.run("import os; os.killpg(0, 9)", limits=QUICK)
    assert said(box, "print(1)") == "1"  # who asked is still there


def test_10_no_process_outside_can_be_traced_and_no_power_is_left(box):
    trace = f"import ctypes; assert ctypes.CDLL(None).ptrace(16, {box.pid}, 0, 0) == 0"
    assert attempt(box, trace) == "AssertionError"
    mount = "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0"
    assert attempt(box, mount) == "AssertionError"
    assert attempt(box, "os.chroot('/tmp')") == "PermissionError"
    assert attempt(box, "os.sethostname") == "AttributeError"


def test_11_endless_output_costs_no_memory(box):
    outcome = box.run("while True: print('x' * 10_000)", limits=Limits(seconds=0.5, output=1000))
    assert len(outcome.stdout) == 1000


@pytest.mark.parametrize(
    "hack",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import builtins; builtins.print = lambda *a: None",
        "class E(str):\n    __eq__ = lambda *a: True\nprint(E('5'))",
        "raise SystemExit",
    ],
)
def test_12_a_program_cannot_grade_itself(box, hack):
    reply = f"```python\n{hack}\n```"
    assert box.code([reply], [[{"input": "2", "output": "4"}]]) == [0.0]


def test_a_right_program_is_rewarded_and_only_for_all_tests(box):
    doubles = "<think>easy</think>\n```python\nprint(2 * int(input()))\n```"
    tests = [{"input": "2", "output": "4"}, {"input": "3", "output": "6"}]
    assert box.code([doubles], [tests]) == [1.0]
    assert box.code([doubles], [[*tests, {"input": "4", "output": "9"}]]) == [0.0]
    function = "```\ndef f(x):\n    return x * 2\n```"
    assert box.code([function, "no program"], [[{"call": "f('a')", "output": "'aa'"}]] * 2) == [1.0, 0.0]


def test_the_program_is_the_last_one_after_the_thoughts():
    text = "<think>```python\nwrong\n```</think>```python\nfirst\n``` or ```python\nlast\n```"
    assert program_in(text) == "last\n"
    assert program_in("<answer>print(1)</answer>") == "print(1)" and program_in("none") is None


def test_without_isolation_nothing_is_run(monkeypatch):
    sandbox.require_isolation.cache_clear()
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(SandboxMissing, match="only be run isolated on Linux"):
        code_reward(["```python\nprint(4)\n```"], [[{"output": "4"}]])
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "_run", lambda *_: sandbox.Outcome(120, "", "OSError: unshare: no"))
    sandbox.require_isolation.cache_clear()
    with pytest.raises(UserError, match=r"gives no namespaces .* unshare: no"):
        run_python("print(4)")
    sandbox.require_isolation.cache_clear()


def test_a_user_whom_the_kernel_refuses_namespaces_is_told_and_runs_nothing():
    """As in a container with Docker's own profile; and it is told at once."""
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-sandbox-"))
    folder.chmod(0o755)
    blind = Stranger(folder, "blind")
    try:
        started = time.monotonic()
        with pytest.raises(SandboxMissing, match=r"gives no namespaces .*unshare: Operation not permitted") as told:
            blind.code(["```python\nprint(4)\n```"], [[{"output": "4"}]])
        assert time.monotonic() - started < 4 and "seccomp" in told.value.hint
    finally:
        blind.close()
        shutil.rmtree(folder)


def test_root_whom_the_kernel_refuses_namespaces_is_told_at_once():
    """A helper of root's must not keep the refusal waiting."""
    if os.getuid() != 0:
        pytest.skip("only for root")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(DRIVER.parent), "blind"],
        input='["code", [["```\\nprint(4)\\n```"], [[{"output": "4"}]]]]\n',
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "unshare: Operation not permitted" in json.loads(done.stdout)["refused"][1]
    assert time.monotonic() - started < 4


def test_a_program_starts_quickly(box):
    box.run("")
    started = time.perf_counter()
    for _ in range(5):
        box.run("")
    assert (time.perf_counter() - started) / 5 < 2.0  # about 0.05 s on an idle machine
