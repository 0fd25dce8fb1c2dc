"""`gunicorn -c gunicorn.conf.py --preload wsgi_wrapper:app` (run.sh): importing this starts the stages, once,
in gunicorn's master; the workers are forked from it afterwards."""

from __future__ import annotations

from light_tts.server import api_cli, api_start
from light_tts.server.core.settings import SettingsError

if not api_start.preloading():
    raise RuntimeError(
        "wsgi_wrapper starts the whole server and must be imported by gunicorn's master with its settings: "
        "use run.sh, or gunicorn -c gunicorn.conf.py --preload wsgi_wrapper:app"
    )
try:
    app = api_start.start(api_cli.from_environment())
except SettingsError as error:
    api_cli.refuse(error)
