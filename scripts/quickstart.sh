#!/usr/bin/env bash
# Quick start: installs Light-TTS into .venv, starts the server, speaks a sentence and writes it to out.wav.
#   bash scripts/quickstart.sh ["The sentence to speak."]
# MODEL_DIR selects a checkpoint other than the bundled voice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec .venv/bin/python scripts/quickstart.py "$@"
