"""The image is built and run for real, without Docker: buildah and podman, as root, on a stand-in for its base.

The stand-in is Debian as `mmdebstrap` makes it from Debian's own packages. llama.cpp is not compiled again: a wheel of
it has to lie in `.venv/wheels`, where CI has put it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = "docker.io/library/stand-in:debian"
IMAGE = "localhost/stillhouse:test"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
RUN = ("podman", "--runtime", "runc", "--cgroup-manager=cgroupfs")
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def did(*command: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | (environment or {}))
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A store of images of its own, and what a program has to be told of it."""
    if os.geteuid() != 0:
        pytest.skip("buildah and podman are to run as root here")
    for name in ("buildah", "podman", "runc", "mmdebstrap"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (.ci/deploy-tools installs it)")
    folder = tmp_path_factory.mktemp("containers")
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n'
    )
    environment = {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "BUILDAH_ISOLATION": "chroot"}
    yield environment
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def image(storage: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    wheels = Path(sys.prefix) / "wheels"
    if not list(wheels.glob("llama_cpp_python-*.whl")):
        pytest.skip(f"there is no wheel of llama-cpp-python in {wheels}: pip wheel --no-deps --wheel-dir … makes one")
    tar = tmp_path_factory.mktemp("base") / "base.tar"
    did("mmdebstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(tar))
    container = did("buildah", "from", "scratch", environment=storage)
    did("buildah", "add", container, str(tar), "/", environment=storage)
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    did("buildah", "config", "--env", f"PATH={path}", container, environment=storage)
    did("buildah", "commit", "--rm", container, BASE, environment=storage)
    tar.unlink()
    certificates = ("-v", f"{CERTIFICATES}:{CERTIFICATES}:ro", "--env", f"PIP_CERT={CERTIFICATES}")
    ready = ("-v", f"{wheels}:/wheels:ro", "--build-arg", "PIP_FIND_LINKS=/wheels")
    options = ("--isolation", "chroot", "--pull-never", "--format", "docker", "--build-arg", f"BASE={BASE}")
    did("buildah", "bud", *options, *certificates, *ready, "-t", IMAGE, ".", environment=storage)
    return IMAGE


def test_the_image_says_how_it_is_to_be_run(image, storage):
    told = json.loads(did("buildah", "inspect", "--type", "image", image, environment=storage))["Docker"]["config"]
    assert (told["User"], told["StopSignal"], list(told["Volumes"])) == ("10001:10001", "SIGTERM", ["/models"])
    assert "/health/ready" in " ".join(told["Healthcheck"]["Test"])


def test_a_container_answers_as_a_plain_user_on_a_read_only_root_and_stops_well(image, storage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{(port := free.getsockname()[1])}"
    flags = (
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--threads",
        "1",
        "--context",
        "512",
        "--parallel",
        "1",
    )
    options = ("-d", "--pull=never", "--network=host", "--no-healthcheck", "-v", "stillhouse-test:/models")
    name = did(*RUN, "run", *options, *LIMITS, *HARDENED, image, *flags, environment=storage)

    def inside(*command: str) -> str:
        done = subprocess.run([*RUN, "exec", name, *command], capture_output=True, text=True, env=os.environ | storage)
        return done.stdout + done.stderr

    def is_ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health/ready").status_code == 200
        return False

    try:
        deadline = time.monotonic() + 120
        while not is_ready():
            assert time.monotonic() < deadline, did(*RUN, "logs", name, environment=storage)
            time.sleep(0.2)
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert reply["choices"][0]["message"]["content"]
        status = inside("cat", "/proc/1/status")
        told = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert (told["Uid"].split()[0], told["Gid"].split()[0]) == ("10001", "10001")
        assert (int(told["CapEff"], 16), int(told["CapBnd"], 16), told["NoNewPrivs"]) == (0, 0, "1")
        assert "Read-only file system" in inside("touch", "/x")
        assert inside("touch", "/models/x", "/tmp/x") == ""
        began = time.monotonic()
        did(*RUN, "stop", "-t", "10", name, environment=storage)
        assert time.monotonic() - began < 10
        assert did(*RUN, "inspect", name, "--format", "{{.State.ExitCode}}", environment=storage) == "0"
    finally:
        subprocess.run([*RUN, "rm", "-f", name], capture_output=True, env=os.environ | storage)
