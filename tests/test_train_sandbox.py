"""Twelve ways out of the sandbox, all shut; and that nothing runs where they cannot be shut."""

from __future__ import annotations

import os
import socket
import sys
import time

import pytest

from stillhouse.r1.errors import UserError
from stillhouse.train import sandbox
from stillhouse.train.rewards import code as code_reward
from stillhouse.train.rewards import program_in
from stillhouse.train.sandbox import Limits, SandboxMissing, run_python

QUICK = Limits(seconds=1.0, memory=256 << 20, disk=1 << 20, processes=8)


@pytest.fixture
def isolated() -> None:
    try:
        sandbox.require_isolation()
    except SandboxMissing as error:
        pytest.skip(str(error))


def said(source: str, stdin: str = "", limits: Limits = QUICK) -> str:
    outcome = run_python(source, stdin, limits)
    return outcome.stdout.strip() or f"{outcome.code}: {outcome.stderr.strip()}"


def attempt(action: str) -> str:
    return said(
        f"import os\ntry:\n    {action}\n    print('out')\nexcept BaseException as e:\n    print(type(e).__name__)"
    )


@pytest.mark.usefixtures("isolated")
def test_a_program_reads_its_input_and_prints():
    assert said("print(sum(map(int, input().split())))", "17 25") == "42"
    assert run_python("import sys; sys.exit(3)").code == 3
    assert "ZeroDivisionError" in run_python("1/0").stderr


@pytest.mark.usefixtures("isolated")
def test_1_the_network_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert attempt(f"import socket; socket.create_connection(('127.0.0.1', {port}), 0.5)") == "OSError"


@pytest.mark.usefixtures("isolated")
def test_2_a_fork_bomb_stays_small_and_ends():
    source = "import os, time\ncount = 0\ntry:\n    for _ in range(200):\n"
    source += "        os.fork() or os._exit(time.sleep(9))\n        count += 1\n"
    source += "except OSError:\n    print('stopped', count < 20)"
    assert said(source) == "stopped True"


@pytest.mark.usefixtures("isolated")
def test_3_memory_ends_before_the_machines_does():
    assert attempt("x = bytearray(1 << 30)") == "MemoryError"


@pytest.mark.usefixtures("isolated")
def test_4_the_disk_cannot_be_filled():
    assert attempt("[open(f'/tmp/{n}', 'wb').write(bytes(500_000)) for n in range(50)]") == "OSError"


@pytest.mark.usefixtures("isolated")
def test_5_an_endless_loop_ends():
    started = time.monotonic()
    assert run_python("while True: pass", limits=QUICK).code != 0
    assert run_python("import time; time.sleep(60)", limits=QUICK).timed_out
    assert time.monotonic() - started < 20


@pytest.mark.usefixtures("isolated")
def test_6_files_of_this_machine_are_not_seen(tmp_path):
    (tmp_path / "secret").write_text("hunter2")
    assert attempt(f"print(open({str(tmp_path / 'secret')!r}).read())") == "FileNotFoundError"
    assert attempt("os.listdir('/home')") == attempt("os.listdir('/etc')") == "FileNotFoundError"


@pytest.mark.usefixtures("isolated")
def test_7_secrets_in_the_environment_are_not_seen(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    assert said("import os; print(sorted(os.environ))") == "['LANG', 'PATH']"
    assert attempt("open('/proc/1/environ')") == attempt("open('/proc/self/environ')") == "FileNotFoundError"


@pytest.mark.usefixtures("isolated")
def test_8_nothing_is_written_outside(tmp_path):
    assert attempt(f"open({str(tmp_path / 'x')!r}, 'w')") == "FileNotFoundError"
    assert attempt("import sys; open(sys.prefix + '/x', 'w')") == "OSError"
    assert attempt("open('/usr/x', 'w')") == "OSError"
    assert attempt("open('/tmp/x', 'w').write('here it may'); assert not os.path.exists('/tmp/y')") == "out"
    assert said("import os; print(os.listdir('/tmp'))") == "[]"  # and it is gone


@pytest.mark.usefixtures("isolated")
def test_9_no_process_outside_can_be_killed():
    assert attempt(f"os.kill({os.getpid()}, 9)") == "ProcessLookupError"
    run_python("import os; os.kill(-1, 9)", limits=QUICK)
    run_python("import os; os.killpg(0, 9)", limits=QUICK)
    assert os.getpid()


@pytest.mark.usefixtures("isolated")
def test_10_no_process_outside_can_be_traced_and_no_power_is_left():
    trace = f"import ctypes; assert ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0) == 0"
    assert attempt(trace) == "AssertionError"
    mount = "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0"
    assert attempt(mount) == "AssertionError"
    assert attempt("os.chroot('/tmp')") == "PermissionError"
    assert attempt("os.sethostname") == "AttributeError"


@pytest.mark.usefixtures("isolated")
def test_11_endless_output_costs_no_memory():
    outcome = run_python("while True: print('x' * 10_000)", limits=Limits(seconds=0.5, output=1000))
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
@pytest.mark.usefixtures("isolated")
def test_12_a_program_cannot_grade_itself(hack):
    reply = f"```python\n{hack}\n```"
    assert code_reward([reply], [[{"input": "2", "output": "4"}]]) == [0.0]


@pytest.mark.usefixtures("isolated")
def test_a_right_program_is_rewarded_and_only_for_all_tests():
    doubles = "<think>easy</think>\n```python\nprint(2 * int(input()))\n```"
    tests = [{"input": "2", "output": "4"}, {"input": "3", "output": "6"}]
    assert code_reward([doubles], [tests]) == [1.0]
    assert code_reward([doubles], [[*tests, {"input": "4", "output": "9"}]]) == [0.0]
    function = "```\ndef f(x):\n    return x * 2\n```"
    assert code_reward([function, "no program"], [[{"call": "f('a')", "output": "'aa'"}]] * 2) == [1.0, 0.0]


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


@pytest.mark.usefixtures("isolated")
def test_a_program_starts_quickly():
    run_python("")
    started = time.perf_counter()
    for _ in range(5):
        run_python("")
    assert (time.perf_counter() - started) / 5 < 2.0  # about 0.05 s on an idle machine
