"""The API keys of this server. Only their SHA-256 hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from light_tts.server.core.settings import Settings, SettingsError

VARIABLE = "LIGHT_TTS_API_KEYS"
MIN_LENGTH = 16
SUBPROTOCOL = "openai-insecure-api-key."  # prefix with which browsers send a key in a WebSocket handshake


class ApiKeys:
    """The configured API keys."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in dict.fromkeys(keys)]

    def __len__(self) -> int:
        return len(self._digests)

    def index(self, presented: str) -> int | None:
        """Return the index of a presented key, or None if it is unknown. Takes constant time."""
        digest = _digest(presented)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return matches.index(True) if any(matches) else None


def read_keys(settings: Settings, environ: Mapping[str, str] = os.environ) -> ApiKeys:
    """Return the keys from --api_key, --api_key_file and LIGHT_TTS_API_KEYS. Raises SettingsError."""
    keys = [*_split(settings.api_key, "--api_key"), *_split(environ.get(VARIABLE, ""), VARIABLE)]
    if settings.api_key_file:
        flag = f"--api_key_file {settings.api_key_file}"
        try:
            text = Path(settings.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{flag}: {error}") from error
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        found = [key for line in lines if line for key in _split(line, flag)]
        if not found:
            raise SettingsError(f"{flag}: contains no key")
        keys += found
    return ApiKeys(keys)


def presented_key(headers: Mapping[str, str]) -> str:
    """Return the key sent with a request, or an empty string. `headers`: by lower-case name."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if "xi-api-key" in headers:
        return headers["xi-api-key"].strip()
    for protocol in offered_protocols(headers):
        if protocol.startswith(SUBPROTOCOL):
            return protocol.removeprefix(SUBPROTOCOL)
    return ""


def offered_protocols(headers: Mapping[str, str]) -> list[str]:
    """Return the WebSocket subprotocols that the client offers."""
    return [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",") if name.strip()]


def _split(text: str, where: str) -> list[str]:
    keys = [key.strip() for key in text.split(",") if key.strip()]
    for key in keys:
        if len(key) < MIN_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise SettingsError(
                f"{where}: a key must have at least {MIN_LENGTH} ASCII characters and no spaces; "
                "generate one with: openssl rand -hex 24"
            )
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
