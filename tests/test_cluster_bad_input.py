"""What stands in the way of a cluster is told before anything is loaded: by name, with the way out, with exit code 2.

The other host is this machine under an address that is not its own; what is ssh to it may make it another machine.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.__main__ import main

FAR = "me@far=203.0.113.7"
OTHER = """
import sys
from stillhouse.backends import cluster_host, cluster_node
{changes}
from stillhouse.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
CHANGES = {
    "another version of mlx": "cluster_host.metadata.version = {'mlx': '0.1.0', 'mlx-lm': '0.32.2'}.get",
    "no memory": "cluster_host.free_memory = lambda: 1000",
    "no such model": "cluster_node.resolve = lambda name, **_: cluster_node.resolve_('/nowhere')",
    "another model": "cluster_node.resolve = lambda name, **_: cluster_node.resolve_(name + '-other')",
}


def cluster(*arguments: str, within_s: float = 60) -> tuple[int, str, str]:
    """Run `stillhouse cluster …` to its end: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse", "cluster", *arguments],
        capture_output=True,
        text=True,
        timeout=within_s,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    return done.returncode, done.stdout, done.stderr


def error_and_hint(stderr: str) -> tuple[str, str]:
    lines = [line for line in stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert "Traceback" not in stderr and len(lines) == 2, stderr
    return lines[0], lines[1]


class Elsewhere:
    """Flags for a host elsewhere, which is in some way another than this."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def flags(self, kind: str | None) -> list[str]:
        program, ssh = self.folder / "other.py", self.folder / "ssh"
        keep = "cluster_node.resolve_ = cluster_node.resolve"
        program.write_text(OTHER.format(changes=f"{keep}\n{CHANGES[kind] if kind else ''}"))
        ssh.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
        ssh.chmod(0o700)
        over_there = ["--ssh", str(ssh), "--remote", f"{sys.executable} {program}"]
        return ["--hosts", f"127.0.0.1,{FAR}", "--address", "127.0.0.1", *over_there]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Elsewhere:
    return Elsewhere(tmp_path)


DIFFERENT = {  # what is different there -> in the error, in the hint
    "another version of mlx": ("different versions of mlx: 0.1.0 on me@far", "pip install mlx=="),
    "no memory": ("host me@far has 0.0 GB for its share of tiny", "more hosts"),
    "no such model": ("host me@far: there is no file /nowhere", ""),
    "another model": ("the model of me@far is not the one of 127.0.0.1", "on every host"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_host_that_is_different_is_named(elsewhere, random_checkpoint, tmp_path, kind):
    folder = random_checkpoint.write_checkpoint(tmp_path / "tiny", random_checkpoint.random_model("qwen2"))
    other = random_checkpoint.Shape(forward=256)
    random_checkpoint.write_checkpoint(tmp_path / "tiny-other", random_checkpoint.random_model("qwen2", shape=other))
    flags = ["--strategy", "tensor", "--port", "0", *elsewhere.flags(kind)]
    code, stdout, stderr = cluster("serve", str(folder), *flags)
    error, hint = error_and_hint(stderr)
    words, way_out = DIFFERENT[kind]
    assert (code, stdout, words in error, way_out in hint) == (2, "", True, True), stderr


@pytest.mark.slow
def test_a_model_that_the_hosts_cannot_divide_is_told_before_any_host_is_asked(random_checkpoint, tmp_path):
    shape = random_checkpoint.Shape(width=48, heads=3, kv_heads=3)
    folder = random_checkpoint.write_checkpoint(
        tmp_path / "three", random_checkpoint.random_model("qwen2", shape=shape)
    )
    code, _, stderr = cluster("serve", str(folder), "--hosts", "127.0.0.1,203.0.113.7", "--strategy", "tensor")
    error, hint = error_and_hint(stderr)
    assert (code, "3 KV heads" in error, "--strategy pipeline or replicas" in hint) == (2, True, True), stderr


@pytest.fixture
def no_reply(tmp_path: Path) -> list[str]:
    """A host that ssh does not reach, as ssh says it."""
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho ssh: connect to host far port 22: No route to host >&2\nexit 255\n")
    ssh.chmod(0o700)
    return ["--hosts", f"127.0.0.1,{FAR}", "--address", "127.0.0.1", "--ssh", str(ssh), "--nodes-timeout", "2"]


@pytest.mark.slow
def test_a_host_that_does_not_answer_is_named_with_what_ssh_says(no_reply, checkpoint_path):
    code, _, stderr = cluster("serve", str(checkpoint_path), "--port", "0", *no_reply)
    error, hint = error_and_hint(stderr)
    assert (code, "host me@far is not connected: ssh: connect to host far" in error) == (2, True), stderr
    assert "me@far stillhouse --version" in hint


ALONE = {  # flags -> in the error
    "no hosts": ([], "which hosts?"),
    "an empty name": (["--hosts", "a,,b"], "no list of 1 to 64 hosts"),
    "an unknown host": (["--hosts", "no-such-host.invalid"], "the host no-such-host.invalid is not known"),
    "hosts twice": (["--hosts", "127.0.0.1", "--hostfile", "x"], "which hosts?"),
    "no such host file": (["--hostfile", "/nowhere"], "the host file /nowhere cannot be read"),
    "no such key file": (["--hosts", "127.0.0.1", "--key-file", "/nowhere"], "there is no key file /nowhere"),
    "agents without a key": (["--hosts", "127.0.0.1", "--agents"], "--agents needs a key"),
    "an address of another": (["--hosts", "127.0.0.1", "--address", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    "RDMA without devices": (["--hosts", "127.0.0.1,127.0.0.1", "--backend", "jaccl"], "needs the RDMA devices"),
    "an unknown strategy": (["--hosts", "127.0.0.1", "--strategy", "magic"], "'magic' is not auto, tensor"),
    "a port of letters": (["--hosts", "127.0.0.1", "--control-port", "x"], "'x'"),
}


@pytest.mark.parametrize(("flags", "words"), ALONE.values(), ids=ALONE)
def test_flags_that_cannot_be_are_told(flags, words, checkpoint_path, capsys):
    code = main(["cluster", "serve", str(checkpoint_path), "--port", "0", *flags])
    told = capsys.readouterr()
    error, _ = error_and_hint(told.err)
    assert (code, told.out, words in error) == (2, "", True), told.err


def test_a_key_file_that_others_may_read_is_refused(tmp_path, checkpoint_path, capsys):
    file = tmp_path / "key"
    file.write_text("ab" * 32)
    file.chmod(0o640)
    code = main(["cluster", "serve", str(checkpoint_path), "--hosts", "127.0.0.1", "--key-file", str(file)])
    assert (code, error_and_hint(capsys.readouterr().err)) == (
        2,
        (f"error: others may read the key file {file} (its mode is 640)", f"hint: chmod 600 {file}"),
    )


@pytest.mark.parametrize("flag", ["--port", "--control-port"])
def test_a_port_in_use_is_told(flag, checkpoint_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ["--hosts", "127.0.0.1", *([] if flag == "--port" else ["--port", "0"]), flag, port]
        code, _, stderr = cluster("serve", str(checkpoint_path), *flags)
    assert (code, port in error_and_hint(stderr)[0]) == (2, True), stderr


def test_a_file_that_no_cluster_serves_is_told(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    code, _, stderr = cluster("serve", str(file), "--hosts", "127.0.0.1", "--port", "0")
    assert (code, "model.gguf" in error_and_hint(stderr)[0]) == (2, True), stderr


def test_a_node_without_a_key_or_a_head_is_told():
    for flags, words in (
        (["--join", "127.0.0.1"], "no address of a head"),
        (["--join", "127.0.0.1:1"], "stdin does not hold 64 hexadecimal digits"),
    ):
        code, _, stderr = cluster("node", *flags)
        assert (code, words in error_and_hint(stderr)[0]) == (2, True), stderr


# doctor and plan, who ask hosts and load nothing


def test_the_doctor_finds_nothing_where_nothing_is(elsewhere):
    code, stdout, stderr = cluster("doctor", "--hosts", "127.0.0.1,127.0.0.1")
    rows = [line.split() for line in stdout.splitlines()]
    assert (code, rows[0][:2], [row[0] for row in rows[1:3]]) == (0, ["HOST", "ADDRESS"], ["127.0.0.1"] * 2), stderr
    assert [row[-1] for row in rows if row and row[-1] == "MB/s"] == ["MB/s"] * 2
    assert rows[-1] == ["nothing", "stands", "in", "the", "way"]


TROUBLES = {
    "another version of mlx": "trouble: the hosts have different versions of mlx: 0.1.0 on me@far",
    None: "trouble: 127.0.0.1 does not reach me@far (203.0.113.7)",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TROUBLES)
def test_the_doctor_names_every_trouble_with_its_way_out(elsewhere, kind):
    """A rank's address that is not the host's own is one: its rank could not listen there."""
    code, stdout, _ = cluster("doctor", *elsewhere.flags(kind))
    lines = stdout.splitlines()
    found = [n for n, line in enumerate(lines) if line.startswith(TROUBLES[kind])]
    assert (code, len(found)) == (2, 1), stdout
    assert lines[found[0] + 1].startswith("  ") and "nothing stands in the way" not in stdout


@pytest.mark.slow
def test_the_doctor_tells_of_a_host_that_does_not_answer(no_reply):
    code, stdout, _ = cluster("doctor", *no_reply)
    assert (code, "does not answer" in stdout) == (2, True)
    assert "trouble: host me@far is not connected: ssh: connect to host far" in stdout


def test_a_plan_asks_the_hosts_for_their_memory(checkpoint_path):
    code, stdout, stderr = cluster("plan", "deepseek-r1:1.5b", "--hosts", "127.0.0.1,127.0.0.1", "--bandwidth", "100")
    assert code == 0, stderr
    assert "deepseek-r1:1.5b on 2 hosts" in stdout and "take: replicas" in stdout
    code, _, stderr = cluster("plan", "deepseek-r1:1.5b")
    assert (code, "--memory" in error_and_hint(stderr)[0]) == (2, True)


def test_a_plan_of_a_folder_goes_by_its_own_bits(random_checkpoint, tmp_path, capsys):
    folder = random_checkpoint.write_checkpoint(tmp_path / "own", random_checkpoint.random_model("qwen2"))
    assert main(["cluster", "plan", str(folder), "--memory", "16,16,16"]) == 0
    stdout = capsys.readouterr().out
    assert "own on 3 hosts" in stdout and "2 KV heads can't be divided among 3; they can among 1, 2" in stdout
