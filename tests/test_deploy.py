"""What deploy/ promises: every file is understood by the tool that it is for, and a reply streams through it.

The tools are what CI installs (`.ci/deploy-tools`); where one is not there, its test says so and is skipped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import plistlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

_spec = importlib.util.spec_from_file_location("server_fixtures", Path(__file__).with_name("server_fixtures.py"))
assert _spec is not None and _spec.loader is not None
fixtures = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = fixtures
_spec.loader.exec_module(fixtures)
said, plain, within, Process = fixtures.said, fixtures.plain, fixtures.within, fixtures.Process

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
CHAT = "/v1/chat/completions"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def tool(name: str) -> str:
    """The path of a program; the test is skipped where there is none."""
    beside = [str(Path(sys.prefix) / "deploy" / "bin"), "/usr/sbin", "/sbin"]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(beside))
    if found is None:
        pytest.skip(f"{name} is not installed (.ci/deploy-tools installs it)")
    return found


def understood(name: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What a tool says of a file that it finds nothing wrong with."""
    command = [tool(name), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("path", [ROOT / "Dockerfile", *FILES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_begins_with_the_command_that_uses_it(path):
    head = "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:4])
    assert re.search(r"\b(docker|systemctl|launchctl|kubectl|nginx|caddy|prometheus|promtool|serve)\b .*\w", head), head


def test_the_dockerfile_is_as_hadolint_wants_it():
    assert understood("hadolint", "Dockerfile") == ""


def test_compose_has_its_schema():
    understood("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "deploy/compose.yaml")


def test_kubernetes_knows_every_field():
    understood("kubernetes-validate", "--strict", "deploy/kubernetes/stillhouse.yaml")


def test_kubernetes_starts_it_as_a_plain_user_and_probes_it_in_three_ways():
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes/stillhouse.yaml").read_text()))
    (pod,) = (d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment")
    (container,) = pod["containers"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 10001)
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    with fixtures.in_process() as server:
        assert [server.get(path).status_code for path in probes.values()] == [200] * 3


# systemd


def test_the_unit_is_as_systemd_wants_it_and_hardly_exposed(tmp_path):
    unit = tmp_path / "stillhouse.service"
    text = (DEPLOY / "systemd/stillhouse.service").read_text()
    unit.write_text(text.replace("/opt/stillhouse/bin/stillhouse", "/bin/true"))
    understood("systemd-analyze", "verify", str(unit))
    told = understood("systemd-analyze", "security", "--offline=true", "--threshold=25", str(unit))
    (level,) = re.findall(r"exposure level for stillhouse\.service: ([0-9.]+)", told)
    assert float(level) <= 2.5


HANGS = """
import time
from stillhouse.backends import echo
step = echo.Echo.step
def hang(self):
    if self._waiting or self._running:
        time.sleep(60)
    return step(self)
echo.Echo.step = hang
"""


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(20)
        self.path = path

    def hears(self) -> str:
        return self.socket.recv(4096).decode()

    def hears_nothing_for(self, seconds: float) -> bool:
        while self.pending():
            self.hears()
        self.socket.settimeout(seconds)
        try:
            self.hears()
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(20)
        return False

    def pending(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(4096, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        finally:
            self.socket.settimeout(20)
        return True


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    other_end = Systemd(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(other_end.path))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    yield other_end
    other_end.socket.close()


def test_systemd_is_told_when_it_is_ready_that_it_lives_and_when_it_stops(systemd):
    with Process() as server:
        assert systemd.hears() == "READY=1"
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert [systemd.hears() for _ in range(3)] == ["WATCHDOG=1"] * 3
        server.told_to_stop()
        assert within(5, lambda: systemd.hears() == "STOPPING=1")
        assert server.exit_code() == 0


def test_the_watchdog_is_not_fed_while_the_engine_hangs(systemd):
    """The event loop still answers: a heartbeat of its own would say that all is well."""
    with Process(more=HANGS) as server, contextlib.suppress(httpx.ReadTimeout):
        assert within(5, lambda: systemd.hears() == "WATCHDOG=1")
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{server.url}{CHAT}", json=plain("a"), timeout=0.5)
        assert systemd.hears_nothing_for(1.5)
        assert httpx.get(f"{server.url}/health").status_code == 200


# launchd


def test_the_plist_says_what_launchd_reads():
    job = plistlib.loads((DEPLOY / "launchd/com.stillhouse.server.plist").read_bytes())
    assert job["ProgramArguments"][:2] == ["/opt/stillhouse/bin/stillhouse", "serve"]
    assert (job["KeepAlive"], job["ExitTimeOut"] > 30) == ({"SuccessfulExit": False}, True)


def test_the_plist_of_a_node_starts_one():
    """Its command is one that the command line takes, and it may be gone before ranks would have to be killed."""
    job = plistlib.loads((DEPLOY / "launchd/com.stillhouse.node.plist").read_bytes())
    program, *arguments = job["ProgramArguments"]
    assert program == "/opt/stillhouse/bin/stillhouse"
    assert (job["KeepAlive"], job["ExitTimeOut"] >= 10) == ({"SuccessfulExit": False}, True)
    done = subprocess.run([sys.executable, "-m", "stillhouse", *arguments], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        "error: there is no key file /var/stillhouse/cluster.key",
    )


# Proxies


def arrivals(url: str, **headers: str) -> tuple[list[float], str]:
    """When each piece of an answer came, seconds after the first, and the whole of it."""
    pieces: list[str] = []
    times: list[float] = []
    body = plain("word " * 8, stream=True)
    with httpx.stream("POST", f"{url}{CHAT}", json=body, headers=headers, timeout=20) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {") and (text := json.loads(line[6:])["choices"][0]["delta"].get("content")):
                pieces.append(text)
                times.append(time.monotonic())
    return [at - times[0] for at in times], "".join(pieces)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server with a key, 20 ms a token: an answer of 40 takes 0.8 s."""
    monkeypatch.setenv("STILLHOUSE_API_KEY", "sk-deploy")
    with Process(step_s=0.02) as server:
        yield server


def through(url: str) -> None:
    """A stream comes token by token, and a client that leaves is noticed."""

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    assert within(10, answers)
    times, text = arrivals(url, authorization="Bearer sk-deploy")
    assert (text, len(times)) == ("word " * 8, 40)
    assert times[-1] > 0.5, "they came in one lump"
    assert httpx.post(f"{url}{CHAT}", json=plain("a")).status_code == 401


def test_a_stream_comes_through_nginx_token_by_token(served, tmp_path):
    port = free_port()
    site = (DEPLOY / "nginx/stillhouse.conf").read_text()
    site = site.replace("listen 80;", f"listen 127.0.0.1:{port};").replace("127.0.0.1:8000", served.url.split("//")[1])
    (tmp_path / "site.conf").write_text(site)
    temporary = "".join(f"{kind}_temp_path {tmp_path}/{kind}; " for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    main = tmp_path / "nginx.conf"
    main.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}/body; {temporary} include {tmp_path}/site.conf; }}\n"
    )
    understood("nginx", "-t", "-c", str(main), "-p", str(tmp_path))
    with running("nginx", "-c", str(main), "-p", str(tmp_path)):
        through(f"http://127.0.0.1:{port}")


def test_a_stream_comes_through_caddy_token_by_token(served, tmp_path, monkeypatch):
    port = free_port()
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    understood("caddy", "validate", "--adapter", "caddyfile", "--config", "deploy/caddy/Caddyfile")
    site = (DEPLOY / "caddy/Caddyfile").read_text().replace("127.0.0.1:8000", served.url.split("//")[1])
    site = site.replace("\nllm.example.com {", f"\nhttp://127.0.0.1:{port} {{")
    site = site.replace("{\n\tservers", "{\n\tadmin off\n\tservers", 1)
    (tmp_path / "Caddyfile").write_text(site)
    with running("caddy", "run", "--adapter", "caddyfile", "--config", str(tmp_path / "Caddyfile")):
        through(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def running(name: str, *arguments: str) -> Iterator[None]:
    command = [tool(name), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


# Prometheus and Grafana


def scraped() -> set[str]:
    """The names of the series that servers of both kinds tell, once everything has happened to them once."""
    pages = []
    with Process() as server, Process("--backend", "openai", "--upstream", server.url) as front:
        for one in (front, server):
            httpx.post(f"{one.url}{CHAT}", json=said("Hello"))
            httpx.post(f"{one.url}{CHAT}", json={"messages": []})
            with httpx.stream("POST", f"{one.url}{CHAT}", json=plain("w" * 2000, stream=True)) as response:
                next(pieces := response.iter_bytes())
                pieces.close()
            assert within(5, lambda one=one: one.running() == 0)
            pages.append(httpx.get(f"{one.url}/metrics").text)
    return {name for page in pages for name in re.findall(r"^(r1_\w+)[{ ]", page, re.MULTILINE)}


def test_dashboard_and_alerts_read_only_names_that_a_live_server_tells():
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    asked += (DEPLOY / "prometheus/alerts.yml").read_text()
    names = set(re.findall(r"\br1_\w+", asked))
    assert len(names) > 20 and not names - scraped()


def test_every_panel_of_the_dashboard_has_a_place_of_its_own():
    panels = json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})


def test_prometheus_understands_its_files(tmp_path):
    config = (DEPLOY / "prometheus/prometheus.yml").read_text().replace("/run/secrets/api_key", str(tmp_path / "key"))
    (tmp_path / "key").write_text("sk-deploy\n")
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(DEPLOY / "prometheus/alerts.yml", tmp_path)
    understood("promtool", "check", "config", str(tmp_path / "prometheus.yml"))


def test_prometheus_finds_nothing_wrong_with_a_scrape():
    with Process() as server:
        httpx.post(f"{server.url}{CHAT}", json=said("Hello"))
        page = httpx.get(f"{server.url}/metrics").text
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=page, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Ray


@pytest.mark.slow
def test_ray_serves_replicas_that_stream(tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'ray[serve]'")
    port = free_port()
    script = (
        "import sys, ray; from ray import serve\n"
        f"sys.path.insert(0, {str(DEPLOY / 'ray')!r}); import serve_app\n"
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        f"serve.start(http_options={{'host': '127.0.0.1', 'port': {port}}})\n"
        "serve.run(serve_app.build({'model': 'echo', 'replicas': '2', 'cpus': '0.5'}))\n"
        "print('up', flush=True); sys.stdin.read(); serve.shutdown(); ray.shutdown()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(DEPLOY / "ray"), "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout and process.stdin
        assert any(line == "up\n" for line in process.stdout)
        url = f"http://127.0.0.1:{port}"
        replies = [httpx.post(f"{url}{CHAT}", json=said("Hello"), timeout=30).json() for _ in range(8)]
        assert {reply["choices"][0]["message"]["content"] for reply in replies} == {"Hello"}
        times, text = arrivals(url)
        assert (text, len(times)) == ("word " * 8, 40)
        process.stdin.close()
        assert process.wait(60) == 0
