"""Replicas of the whole server behind the proxy of Ray Serve.

`light-tts serve --ray 2 --port 8080 ...` starts them on this machine, or on the cluster given by RAY_ADDRESS;
`serve deploy config/ray_serve.yaml` on a cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
import ray
from ray import serve

from light_tts.common import gpu
from light_tts.scale import autoscaling
from light_tts.scale.forward import Forward, NotBegun, Piece, Request
from light_tts.scale.replica import ReplicaServer
from light_tts.server import api_cli
from light_tts.server.core.settings import Settings, SettingsError

NAME = "light-tts"
# in addition to the speech requests of a replica, which should itself refuse excess requests, with a reason
STATUS_REQUESTS = 64
PAUSE = 0.5  # seconds between retries of a request of a dead server; Serve may choose the same replica
STOP_SECONDS = 15.0  # beyond --drain_timeout
# A single proxy counts the requests of each replica itself. Serve discards these counts after 10 s, and then
# sends most of a burst to the replica that reports its count first.
ONE_PROXY = {"RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": "86400"}
# The proxy repeats requests whose replica was killed before their responses began.
RETRY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "light_tts.scale.retry.middlewares"}


@serve.deployment(health_check_period_s=2, health_check_timeout_s=10)
@serve.ingress()
class Replica:
    """A server in a separate process, and a proxy for it."""

    def __init__(self, flags: Sequence[str], directory: str) -> None:
        context = serve.get_replica_context()
        replica = context.replica_id.unique_id
        settings = api_cli.parse(_within(flags, directory)).settings
        flags = [*flags, "--ssl_certfile", "", "--ssl_keyfile", ""]  # the proxy terminates TLS
        if settings.log_dir:
            flags = [*flags, "--log_dir", os.path.join(settings.log_dir, replica)]
        self._retry_seconds = settings.request_timeout
        self._stop_seconds = settings.drain_timeout + STOP_SECONDS
        self._server = ReplicaServer(flags, directory)
        self._others = serve.get_deployment_handle(context.deployment, app_name=context.app_name)
        max_body = int(settings.max_upload_mb * 2**20)
        self._forward = Forward(self._server.url, max_body, self._elsewhere, replica)

    def __serve_build_asgi_app__(self) -> Forward:
        return self._forward

    async def check_health(self) -> None:
        await self._server.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metrics for Serve's autoscaling policy; empty while the server does not answer."""
        try:
            return {autoscaling.METRIC: await self._server.metric(autoscaling.METRIC)}
        except httpx.HTTPError:
            return {}

    async def answer(self, request: Request) -> AsyncIterator[Piece]:
        """Yield a response for another replica whose server is gone; nothing if this one's is gone as well,
        because Serve would log the traceback of every retry."""
        with contextlib.suppress(NotBegun):
            async for piece in self._forward.answer(request):
                yield piece

    async def _elsewhere(self, request: Request) -> AsyncIterator[Piece]:
        """Yield the response of any replica chosen by Serve, retrying if its server is gone. It may be this
        replica, whose server may have been restarted. Raises NotBegun if none serves it within
        --request_timeout."""
        end = time.monotonic() + self._retry_seconds
        while time.monotonic() < end:
            begun = False
            try:
                async for piece in self._others.options(stream=True).answer.remote(request):
                    begun = True
                    yield piece
            except ray.exceptions.RayActorError:
                if begun:
                    raise
            if begun:
                return
            await asyncio.sleep(PAUSE)
        raise NotBegun("no replica serves")

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.stop(self._stop_seconds)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Return the application of a `serve deploy` file. `args`: `flags`, the server's flags as a string or a
    list; `replicas` (1); `gpus` and `cpus` of each (0, 1); `directory` that relative paths start from (the
    current one). Raises SettingsError."""
    unknown = set(args) - {"flags", "replicas", "gpus", "cpus", "directory"}
    if unknown:
        raise SettingsError(f"args of {NAME}: there is no {', '.join(sorted(unknown))}")
    given = args.get("flags", [])
    flags = given.split() if isinstance(given, str) else [str(word) for word in given]
    directory = str(args.get("directory", os.getcwd()))
    settings = api_cli.parse(_within(flags, directory)).settings
    _check(settings)
    deployment: Any = Replica  # the decorator's result has no type if Ray is missing
    return deployment.options(
        name=NAME,
        num_replicas=int(args.get("replicas", 1)),
        ray_actor_options={"num_gpus": float(args.get("gpus", 0)), "num_cpus": float(args.get("cpus", 1))},
        max_ongoing_requests=settings.max_pending_requests + STATUS_REQUESTS,
        max_queued_requests=settings.max_pending_requests,
        graceful_shutdown_timeout_s=settings.drain_timeout + STOP_SECONDS,
    ).bind(flags, directory)


def _within(flags: Sequence[str], directory: str) -> list[str]:
    """Return the flags with relative paths resolved from `directory`."""
    os.chdir(directory)
    return list(flags)


def _check(settings: Settings) -> None:
    if settings.replace:
        raise SettingsError("--replace: Ray Serve replaces replicas itself (serve deploy)")


def run(argv: Sequence[str]) -> int:
    """Run `light-tts serve --ray N` until SIGTERM or Ctrl-C. Returns the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--ray", type=int, required=True)
    parser.add_argument("--ray_gpus", type=float, default=1 if gpu.visible_gpus() else 0)
    known, flags = parser.parse_known_args(argv)
    try:
        settings = api_cli.parse(flags).settings
        application = build({"flags": flags, "replicas": known.ray, "gpus": known.ray_gpus})
    except SettingsError as error:
        api_cli.refuse(error)
    tls = {}
    if settings.ssl_certfile:  # terminated by the proxy
        tls = {"ssl_certfile": settings.ssl_certfile, "ssl_keyfile": settings.ssl_keyfile}
    for name, value in (ONE_PROXY | RETRY).items():
        os.environ.setdefault(name, value)
    ray.init(include_dashboard=False, log_to_driver=True, ignore_reinit_error=True)
    serve.start(http_options={"host": settings.host, "port": settings.port, **tls})
    serve.run(application, name=NAME, route_prefix="/")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after `ray.init`, whose handlers end everything at once
        signal.signal(number, lambda _number, _frame: stop.set())
    print(f"light-tts: {known.ray} replicas serve on {settings.host}:{settings.port}", flush=True)
    stop.wait()
    print("light-tts: the replicas finish their requests", file=sys.stderr, flush=True)
    _finish(settings.drain_timeout + STOP_SECONDS)
    return 0


def _finish(seconds: float) -> None:
    """Let the replicas finish their requests, for at most `seconds`, then end Serve. `serve.shutdown` alone
    ends the proxy at once, and with it all streams."""
    end = time.monotonic() + seconds
    serve.delete(NAME, _blocking=False)
    while NAME in serve.status().applications and time.monotonic() < end:
        time.sleep(PAUSE)
    serve.shutdown()
    ray.shutdown()
