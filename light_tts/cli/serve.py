"""`light-tts serve`: the server, as `python -m light_tts.server.api_server` starts it."""

from __future__ import annotations

from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    from light_tts.server import api_server  # imports what only a server needs

    api_server.main(argv)
    return 0
