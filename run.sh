#!/usr/bin/env bash
# Starts the server under gunicorn. Flags of `python -m light_tts.server.api_server` may be appended.
#   MODEL_DIR  checkpoint directory (default: the bundled voice)
#   WORKERS    HTTP workers (4)
#   HOST       address to listen on (0.0.0.0)
#   PORT       HTTP port (8080)
#   TIMEOUT    seconds without a heartbeat after which a worker is killed (300)
#   KEEPALIVE  seconds an idle connection is kept open (5)
#   LIGHT_TTS_CONFIG  settings file (config/production.yaml if it exists; variables and flags take precedence)
#   PYTHON     interpreter (default: that of .venv next to this file, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

flags=()
[[ -n "${MODEL_DIR:-}" ]] && flags+=(--model_dir "$MODEL_DIR")
[[ -n "${WORKERS:-}" ]] && flags+=(--httpserver_workers "$WORKERS")
[[ -n "${HOST:-}" ]] && flags+=(--host "$HOST")
[[ -n "${PORT:-}" ]] && flags+=(--port "$PORT")
[[ -n "${KEEPALIVE:-}" ]] && flags+=(--idle_timeout "$KEEPALIVE")
LIGHT_TTS_FLAGS=$("$PYTHON" -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "${flags[@]}" "$@")
export LIGHT_TTS_FLAGS TIMEOUT="${TIMEOUT:-300}"

# The stages share the cores: without a limit each would start one thread per core.
threads=$("$PYTHON" -m light_tts.server.supervision.threads)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-$threads}"
export MKL_NUM_THREADS="${MKL_NUM_THREADS:-$threads}"

exec "$PYTHON" -m gunicorn -c gunicorn.conf.py --preload wsgi_wrapper:app
