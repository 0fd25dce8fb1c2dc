"""`light-tts serve`: starts the server like `python -m light_tts.server.api_server`; with `--ray N`, N of
them behind Ray Serve."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    if any(word.partition("=")[0] == "--ray" for word in argv):
        try:
            from light_tts.scale import ray_serve
        except ImportError as error:
            if error.name != "ray":
                raise
            print("light-tts: error: --ray: install Ray with: pip install 'light-tts[ray]'", file=sys.stderr)
            return 2
        return ray_serve.run(argv)
    from light_tts.server import api_server  # only a server needs these imports

    api_server.main(argv)
    return 0
