#!/usr/bin/env bash
# The first command: installs Light-TTS into .venv, starts the server, lets it say a sentence and leaves out.wav.
#   bash scripts/quickstart.sh ["What it shall say."]
# MODEL_DIR names another checkpoint than the voice that comes with Light-TTS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec .venv/bin/python scripts/quickstart.py "$@"
