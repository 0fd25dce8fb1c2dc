"""`light-tts bench`: the load generator."""

from __future__ import annotations

from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    from light_tts.tools.bench import command  # requires aiohttp, with a message if it is missing

    return command.main(list(argv))
