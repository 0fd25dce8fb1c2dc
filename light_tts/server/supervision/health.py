"""The health monitor (--health_monitor): requests GET /health like a client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable

from light_tts.server.core.settings import Settings

FIRST_AFTER = 6.0  # seconds before the first check
TIMEOUT = 70.0  # a check itself gives up after 60
FAILURES_BEFORE_RESTART = 3

log = logging.getLogger("light_tts.supervisor")


def url_of(settings: Settings) -> str:
    """Return the server's URL on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"


async def monitor(settings: Settings, restart: Callable[[str, str], None]) -> None:
    """Run forever: once /health has failed 3 times in a row, call `restart(name of a stage process, why)` for
    each process that it names."""
    url = f"{url_of(settings)}/health"
    failures = 0
    await asyncio.sleep(FIRST_AFTER)
    while True:
        problem, stages = await asyncio.to_thread(_ask, url)
        failures = failures + 1 if problem else 0
        if problem:
            log.error("health check %d of %d failed: %s", failures, FAILURES_BEFORE_RESTART, problem)
        if failures == FAILURES_BEFORE_RESTART:
            failures = 0
            for name in stages:
                restart(name, f"{FAILURES_BEFORE_RESTART} health checks in a row failed; the last: {problem}")
        await asyncio.sleep(settings.health_check_interval)


def _ask(url: str) -> tuple[str, list[str]]:
    """Return what is wrong, or an empty string, and the processes that probably cause it."""
    own = ssl._create_unverified_context()  # the certificate is not issued for this machine's local name
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=own)
    )
    try:
        with opener.open(url, timeout=TIMEOUT):
            return "", []
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(ValueError, OSError):
            answer = json.load(error)
            return str(answer["message"]), list(answer.get("stages", []))
        return str(error), []
    except OSError as error:
        return str(error), []
