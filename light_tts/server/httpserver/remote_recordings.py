"""Recordings that a client refers to by URL, fetched only from hosts listed by the operator."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

from light_tts.server.core.settings import Settings
from light_tts.server.httpserver.errors import RequestError

PORTS = {"http": 80, "https": 443}
FIELD = "ref_audio"


def is_address(recording: str) -> bool:
    """Return whether a client's text is a URL rather than a recording."""
    return "://" in recording[:16]


class RemoteRecordings:
    """Fetches recordings from `--ref_audio_hosts` without following redirects, limited to `--max_upload_mb`
    and `--body_timeout` in total. A host listed by name must resolve to public addresses only; a host listed
    by IP address may have any. Concurrent fetches are limited so that they fit in `--max_inflight_upload_mb`;
    the rest wait. httpx is imported only if there are such hosts, as it takes a tenth of a second."""

    def __init__(self, settings: Settings) -> None:
        self._hosts = {host.strip().lower() for host in settings.ref_audio_hosts.split(",") if host.strip()}
        if self._hosts:
            import httpx  # noqa: F401 (now rather than in the first request)
        self._max_mb = settings.max_upload_mb
        self._seconds = settings.body_timeout
        self._places = asyncio.Semaphore(int(settings.max_inflight_upload_mb // settings.max_upload_mb))

    async def read(self, url: str) -> bytes:
        """Return the bytes at this URL. Raises RequestError (400, 408 or 413) with a message on what to
        do.
        """
        parts, port = self._allowed(url)
        import httpx

        try:
            return await asyncio.wait_for(self._fetch(parts, port), self._seconds)
        except asyncio.TimeoutError:
            raise _refused(
                f"did not arrive within {self._seconds:g} s; send the recording itself", 408
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise _refused(f"{parts.hostname} could not be read: {reason}") from None

    def _allowed(self, url: str) -> tuple[SplitResult, int]:
        """Return the parsed URL and its port if its host is listed. Raises RequestError."""
        if not self._hosts:
            raise _refused(
                "URLs are not fetched here: send the recording itself, as base64 or a data: URL "
                "(or have the operator list the host in --ref_audio_hosts)"
            )
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS[parts.scheme]
        except (KeyError, ValueError):
            raise _refused("the address must be a valid one that begins with https:// or http://") from None
        if parts.username is not None or parts.password is not None:
            raise _refused("the address must not hold a user or a password")
        host = parts.hostname or ""
        shown = f"[{host}]" if ":" in host else host
        default = port == PORTS[parts.scheme]
        if f"{shown}:{port}" not in self._hosts and not (default and self._hosts & {shown, host}):
            raise _refused(
                f"the host {f'{shown}:{port}'[:80]!r} is not in --ref_audio_hosts: send the recording "
                "itself, as base64 or a data: URL, or have the operator list it"
            )
        return parts, port

    async def _resolve(self, parts: SplitResult, port: int) -> str:
        """Return the IP address of the host to connect to."""
        host = parts.hostname or ""
        try:
            return str(ipaddress.ip_address(host))  # the host is listed by its IP address
        except ValueError:
            pass
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise _refused(f"the host {host!r} is unknown; check the address") from None
        addresses = [str(entry[4][0]) for entry in found]
        if not all(map(_is_public, addresses)):
            raise _refused(
                f"the host {host!r} has an address that is not public; such a host must be listed in "
                "--ref_audio_hosts by its address"
            )
        return addresses[0]

    async def _fetch(self, parts: SplitResult, port: int) -> bytes:
        import httpx

        address = await self._resolve(parts, port)
        target = parts._replace(
            netloc=f"[{address}]:{port}" if ":" in address else f"{address}:{port}", fragment=""
        )
        limit = int(self._max_mb * 2**20)
        headers = {"Host": parts.netloc, "Accept-Encoding": "identity"}
        tls = {"sni_hostname": parts.hostname}  # check the certificate against the host name
        async with (
            self._places,
            httpx.AsyncClient(timeout=None, trust_env=False) as client,
            client.stream("GET", target.geturl(), headers=headers, extensions=tls) as answer,
        ):
            if answer.is_redirect:
                raise _refused("the address leads to another one; give that one, if its host is allowed")
            if answer.status_code != 200:
                raise _refused(f"{parts.hostname} answered {answer.status_code}; check the address")
            body = bytearray()
            async for piece in answer.aiter_raw():
                body += piece
                if len(body) > limit:
                    raise _refused(
                        f"the recording is larger than {self._max_mb:g} MiB (--max_upload_mb)", 413
                    )
        return bytes(body)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_global


def _refused(problem: str, status: int = 400) -> RequestError:
    return RequestError(status, f"{FIELD}: {problem}", field=FIELD)
