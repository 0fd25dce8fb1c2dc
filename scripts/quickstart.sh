#!/usr/bin/env bash
# The first command: installs Light-TTS into .venv, starts the server, lets it speak and leaves out.wav.
# MODEL_DIR names a checkpoint; without it a tiny one with random weights is made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec .venv/bin/python scripts/quickstart.py
