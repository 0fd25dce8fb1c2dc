"""gunicorn's side of `run.sh`: where it listens, with how many workers, and how it ends (see api_start).

Settings: LIGHT_TTS_FLAGS (a command line), over config/production.yaml (or LIGHT_TTS_CONFIG).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from light_tts.server import api_cli, api_start
from light_tts.server.core.settings import SettingsError

try:
    _parsed = api_cli.from_environment()
except SettingsError as error:
    api_cli.refuse(error)

globals().update(api_start.gunicorn_options(_parsed.settings))
timeout = int(os.environ.get("TIMEOUT") or api_start.TIMEOUT)
