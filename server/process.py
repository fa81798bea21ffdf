"""One server process: its socket, its signals, and its end. Knows nothing of what is served.

The socket is bound before the model is loaded, so that a port in use is told at once and `/health` can say "loading".
On SIGTERM or Ctrl-C the server takes nothing new (503, not a refused connection), lets replies in progress finish for
the grace time, ends those that are left with an error event, and exits with 0. A second signal ends them at once.
Under systemd it says when it is ready, and that it lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import uvicorn

from ..r1.errors import UserError

try:  # beside llama.cpp's threads, what a token costs here slows all of them
    from uvloop import run as run_on_loop
except ImportError:  # Windows
    from asyncio import run as run_on_loop

from .app import Service, create_app
from .settings import Settings
from .upstream_model import AnyModel

if TYPE_CHECKING:
    from .cluster import Cluster

Model = TypeVar("Model", bound=AnyModel)

# For Python's own 5 ms, longer than a step of a small model, a thread that renders a prompt could hold up the engine's.
_SWITCH_S = 0.0005


def serve(
    settings: Settings,
    load: Callable[[], Model],
    announce: Callable[[Model, str], None],
    cluster: Cluster | None = None,
) -> int:
    """Listen, load, answer until told to stop; the exit code. Raises `UserError` where it cannot start."""
    listener = _bind(settings.host, settings.port)
    sys.setswitchinterval(_SWITCH_S)
    port = listener.getsockname()[1]
    service = Service(settings, cluster)
    server = _Server(
        uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=75,
            # What is left by then hangs in a client that does not read.
            timeout_graceful_shutdown=3,
        ),
        service,
    )

    async def run() -> None:
        answering = asyncio.create_task(server.serve(sockets=[listener]))
        loading = _in_a_thread(load)
        await asyncio.wait({answering, loading}, return_when=asyncio.FIRST_COMPLETED)
        if service.draining or not loading.done():  # told to stop; what loads cannot be interrupted, or ended of it
            await answering
            os._exit(0)
        try:
            model = loading.result()
            service.ready(model)
            announce(model, f"http://{_shown(settings.host)}:{port}")
            _tell_systemd("READY=1")
            beating = asyncio.create_task(_beat(service))
        except BaseException:
            server.should_exit = True
            await answering
            raise
        await answering
        beating.cancel()

    try:
        run_on_loop(run())
    finally:
        service.close()
    return 0


class _Server(uvicorn.Server):
    """Uvicorn, but it drains before it closes its doors."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._ending: asyncio.Task[None] | None = None
        self._hurried = False  # a second signal

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT for ourselves; uvicorn's own way closes the listener first and exits by signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._drain())
        else:
            self._hurried = True

    async def _drain(self) -> None:
        service = self._service
        service.draining = True
        _tell_systemd("STOPPING=1")
        if service.in_flight:
            grace = service.settings.grace_s
            print(
                f"stopping: {service.in_flight} in progress, {grace:g} s at most; a second signal ends them",
                file=sys.stderr,
            )
        loop = asyncio.get_running_loop()
        deadline = loop.time() + service.settings.grace_s
        while service.in_flight and loop.time() < deadline and not self._hurried:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(service.close)
        self.should_exit = True


def _in_a_thread(load: Callable[[], Model]) -> asyncio.Future[Model]:
    """Load beside the event loop, in a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Model] = loop.create_future()

    def work() -> None:
        try:
            model = load()
        except BaseException as error:
            loop.call_soon_threadsafe(loaded.set_exception, error)
        else:
            loop.call_soon_threadsafe(loaded.set_result, model)

    threading.Thread(target=work, name="load", daemon=True).start()
    return loaded


async def _beat(service: Service) -> None:
    """Tell systemd's watchdog that we live, as long as the engine does: a step that hangs is to be noticed."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    if not limit.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    limit_s = int(limit) / 1e6
    while True:
        if service.stuck_s < limit_s / 2:
            _tell_systemd("WATCHDOG=1")
        await asyncio.sleep(limit_s / 4)


def _tell_systemd(words: str) -> None:
    """One datagram to whoever started us as a service of the type `notify` (`man 3 sd_notify`); else nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.sendto(words.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # now, and not when uvicorn starts: only then the port is ours
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is taken by another program", f"serve with --port {(port + 1) % 65536}"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs more rights than you have", "serve with --port 8000") from None
        raise UserError(
            f"cannot listen on {host}: {error.strerror or error}", "--host takes an address of yours"
        ) from None
    return listener


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
