"""Recordings that a client names by their address. Opened only at hosts that the operator has listed."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

import httpx

from light_tts.server.core.settings import Settings
from light_tts.server.httpserver.errors import RequestError

PORTS = {"http": 80, "https": 443}
FIELD = "ref_audio"


def is_address(recording: str) -> bool:
    """Whether a client's text is the address of a recording rather than a recording."""
    return "://" in recording[:16]


class RemoteRecordings:
    """Fetches from `--ref_audio_hosts`: within `--max_upload_mb` and `--body_timeout` in all, without
    following a redirect. A host that is listed by its name must have public addresses only; one that is
    listed by its address may be any. As many at a time as fit `--max_inflight_upload_mb`; the rest wait."""

    def __init__(self, settings: Settings) -> None:
        self._hosts = {host.strip().lower() for host in settings.ref_audio_hosts.split(",") if host.strip()}
        self._max_mb = settings.max_upload_mb
        self._seconds = settings.body_timeout
        self._places = asyncio.Semaphore(int(settings.max_inflight_upload_mb // settings.max_upload_mb))

    async def read(self, url: str) -> bytes:
        """The bytes at this address. Raises RequestError: 400, 408 or 413, which says what to do."""
        parts, port = self._allowed(url)
        try:
            return await asyncio.wait_for(self._fetch(parts, port), self._seconds)
        except asyncio.TimeoutError:
            raise _refused(
                f"did not come within {self._seconds:g} s; send the recording itself", 408
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise _refused(f"{parts.hostname} could not be read: {reason}") from None

    def _allowed(self, url: str) -> tuple[SplitResult, int]:
        """-> the address and its port, where the list has its host."""
        if not self._hosts:
            raise _refused(
                "addresses are not opened here: send the recording itself, as base64 or a data: URL "
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
        """An IP address of the host, which is the one that is then connected to."""
        host = parts.hostname or ""
        try:
            return str(ipaddress.ip_address(host))  # it is listed as such
        except ValueError:
            pass
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise _refused(f"the host {host!r} is not known; check the address") from None
        addresses = [str(entry[4][0]) for entry in found]
        if not all(map(_is_public, addresses)):
            raise _refused(
                f"the host {host!r} has an address that is not public; such a host must be listed in "
                "--ref_audio_hosts by its address"
            )
        return addresses[0]

    async def _fetch(self, parts: SplitResult, port: int) -> bytes:
        address = await self._resolve(parts, port)
        target = parts._replace(
            netloc=f"[{address}]:{port}" if ":" in address else f"{address}:{port}", fragment=""
        )
        limit = int(self._max_mb * 2**20)
        headers = {"Host": parts.netloc, "Accept-Encoding": "identity"}
        tls = {"sni_hostname": parts.hostname}  # certificates are checked against the name
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
