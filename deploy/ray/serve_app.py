"""serve run --app-dir deploy/ray serve_app:build model=deepseek-r1:7b replicas=2 gpus=1

Replicas of the server on Ray Serve (pip install 'ray[serve]'), on one machine or a Ray cluster; clients ask
http://127.0.0.1:8000/v1. Keys as elsewhere, from STILLHOUSE_API_KEY. Ray sends a request to the less busy of two
replicas; it does not know where a conversation is cached, and `end_thinking` may reach another replica than the one
that thinks. Ray's dashboard runs what anybody sends it: leave it on this machine, or off.
"""

from __future__ import annotations

import os

from ray import serve
from starlette.types import ASGIApp

from stillhouse.backends.base import LoadOptions
from stillhouse.server.app import Service, create_app
from stillhouse.server.model import load
from stillhouse.server.settings import Settings, key_hash


def build(arguments: dict[str, str]) -> serve.Application:
    """The application; the words behind `serve_app:build` are its arguments."""
    model = arguments.get("model", "deepseek-r1:1.5b")
    parallel = int(arguments.get("parallel", "4"))
    key = os.environ.get("STILLHOUSE_API_KEY")
    settings = Settings(host="0.0.0.0", parallel=parallel, key_hashes=frozenset({key_hash(key)} if key else ()))

    def api() -> ASGIApp:
        """One replica's server; runs where the replica does."""
        service = Service(settings)
        service.ready(load(model, LoadOptions(parallel=parallel)))
        return create_app(service)

    replica = serve.deployment(
        serve.ingress(api)(),
        name="stillhouse",
        num_replicas=int(arguments.get("replicas", "1")),
        max_ongoing_requests=parallel + settings.max_waiting,
        graceful_shutdown_timeout_s=settings.grace_s,
        ray_actor_options={
            "num_cpus": float(arguments.get("cpus", "1")),
            "num_gpus": float(arguments.get("gpus", "0")),
        },
    )
    return replica.bind()
