"""The health monitor (--health_monitor): asks GET /health as a client would."""

from __future__ import annotations

import asyncio
import logging
import urllib.error
import urllib.request

from light_tts.server.core.settings import Settings

FIRST_AFTER = 6.0  # seconds
TIMEOUT = 60.0
FAILURES_BEFORE_END = 3

log = logging.getLogger("light_tts.supervisor")


def url_of(settings: Settings) -> str:
    """Where this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


async def until_unhealthy(settings: Settings) -> str:
    """Returns, with the reason, once /health has failed 3 times in a row."""
    url = f"{url_of(settings)}/health"
    failures = 0
    await asyncio.sleep(FIRST_AFTER)
    while True:
        problem = await asyncio.to_thread(_ask, url)
        failures = failures + 1 if problem else 0
        if problem:
            log.error("health check %d of %d failed: %s", failures, FAILURES_BEFORE_END, problem)
        if failures == FAILURES_BEFORE_END:
            return f"{FAILURES_BEFORE_END} health checks in a row failed; the last: {problem}"
        await asyncio.sleep(settings.health_check_interval)


def _ask(url: str) -> str:
    """What is wrong, or an empty string."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT):
            return ""
    except (OSError, urllib.error.URLError) as error:
        return str(error)
