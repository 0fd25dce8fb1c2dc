"""`python -m light_tts.server.api_server`: parses the flags, starts the supervisor, then runs gunicorn in
this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from gunicorn.app.base import BaseApplication

from light_tts.server import api_cli, api_start
from light_tts.server.core.settings import Settings, SettingsError


class _Application(BaseApplication):
    def __init__(self, settings: Settings, app: Any) -> None:
        self._settings = settings
        self._app = app
        super().__init__()

    def load_config(self) -> None:
        for name, value in api_start.gunicorn_options(self._settings).items():
            if name in self.cfg.settings:  # older versions of gunicorn lack some options
                self.cfg.set(name, value)

    def load(self) -> Any:
        return self._app


def main(argv: Sequence[str] | None = None) -> None:
    try:
        parsed = api_cli.parse(sys.argv[1:] if argv is None else argv)
    except SettingsError as error:
        api_cli.refuse(error)
    _Application(parsed.settings, api_start.start(parsed)).run()


if __name__ == "__main__":
    main()
