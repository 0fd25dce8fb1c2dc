#!/usr/bin/env bash
# Checks this machine, writes the settings, starts the server in the background and waits until it speaks. The
# settings file is replaced once the new server is healthy: keys added by hand are kept, and the previous file is
# saved as .bak. If interrupted, it stops what it started.
#
#   scripts/deploy.sh [MODEL_DIR] [DECODE_WORKERS] [HTTP_WORKERS]
#
# Environment: HOST (0.0.0.0), PORT (8080), LOG_DIR (logs), LOG_FILE (LOG_DIR/console.log), PID_FILE
# (LOG_DIR/light-tts.pid), LIGHT_TTS_CONFIG (config/production.yaml), WAIT_SECONDS (600), PYTHON, and all that
# run.sh uses. Without MODEL_DIR: the bundled voice. Stop the server with: kill $(cat PID_FILE)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_DIR=${1:-${MODEL_DIR:-}}
DECODE_WORKERS=${2:-2}
HTTP_WORKERS=${3:-4}
HOST=${HOST:-0.0.0.0}
PORT=${PORT:-8080}
LOG_DIR=${LOG_DIR:-logs}
LOG_FILE=${LOG_FILE:-$LOG_DIR/console.log}
PID_FILE=${PID_FILE:-$LOG_DIR/light-tts.pid}
CONFIG=${LIGHT_TTS_CONFIG:-config/production.yaml}
WAIT_SECONDS=${WAIT_SECONDS:-600}
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

say() { printf '%s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# -- this machine
for number in "$DECODE_WORKERS" "$HTTP_WORKERS"; do
    [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "DECODE_WORKERS and HTTP_WORKERS are numbers from 1, not '$number'"
done
command -v "$PYTHON" > /dev/null || fail "there is no $PYTHON (set PYTHON)"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$PYTHON is older than Python 3.10"
"$PYTHON" -c 'import torch, gunicorn, light_tts' 2> /dev/null \
    || fail "light_tts is not installed for $PYTHON: $PYTHON -m pip install -c constraints.txt -e ."
gpus=0
if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
    gpus=$(nvidia-smi -L | wc -l)
    say "driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1), $gpus GPUs"
    ((gpus >= DECODE_WORKERS)) || warn "$DECODE_WORKERS decode processes share $gpus GPUs"
else
    warn "no NVIDIA driver or GPU: everything runs on the CPU, slowly"
fi

# -- the model
[[ -n "$MODEL_DIR" ]] || MODEL_DIR=$("$PYTHON" -m light_tts.server.core.default_checkpoint) || exit 1
[[ -d "$MODEL_DIR" ]] || fail "there is no model directory $MODEL_DIR"
version=2
[[ -e "$MODEL_DIR/cosyvoice3.yaml" ]] && version=3
for file in cosyvoice$version.yaml flow.pt hift.pt campplus.onnx speech_tokenizer_v$version.onnx CosyVoice-BlankEN; do
    [[ -e "$MODEL_DIR/$file" ]] || fail "the model in $MODEL_DIR lacks $file"
done
[[ -e "$MODEL_DIR/llm.pt" || -e "$MODEL_DIR/style_config.json" ]] || fail "the model in $MODEL_DIR lacks llm.pt"

# -- only one server
mkdir -p "$(dirname "$LOG_FILE")" "$(dirname "$PID_FILE")" "$(dirname "$CONFIG")"
if [[ -s "$PID_FILE" ]] && kill -0 "$(< "$PID_FILE")" 2> /dev/null; then
    fail "a server runs already: pid $(< "$PID_FILE") ($PID_FILE)"
fi

# -- settings
NEW_CONFIG=$CONFIG.new
MODEL_DIR="$MODEL_DIR" HOST="$HOST" LOG_DIR="$LOG_DIR" CONFIG="$CONFIG" "$PYTHON" - > "$NEW_CONFIG" << END \
    || fail "the settings in $CONFIG cannot be read; its message is above"
import os
import yaml
from pathlib import Path

before = Path(os.environ["CONFIG"])
settings = (yaml.safe_load(before.read_text()) if before.exists() else None) or {}
print("# Written by scripts/deploy.sh. Every flag of light_tts.server.api_server may stand here.")
settings |= {
    "model_dir": os.environ["MODEL_DIR"],
    "host": os.environ["HOST"],
    "port": $PORT,
    "decode_process_num": $DECODE_WORKERS,
    "httpserver_workers": $HTTP_WORKERS,
    "log_dir": os.environ["LOG_DIR"],
}
print(yaml.safe_dump(settings, sort_keys=False), end="")
END

# -- start; run.sh becomes the server, so its pid is the server's
export LIGHT_TTS_CONFIG="$NEW_CONFIG" PYTHON
unset MODEL_DIR WORKERS
HOST='' PORT='' setsid bash run.sh > "$LOG_FILE" 2>&1 < /dev/null &
pid=$!
give_up() {
    kill "$pid" 2> /dev/null || true
    rm -f "$PID_FILE" "$NEW_CONFIG"
}
trap 'give_up; fail "interrupted; the server that was started has been stopped"' INT TERM HUP
echo "$pid" > "$PID_FILE"
say "started: pid $pid ($PID_FILE), log $LOG_FILE"

# -- wait until it speaks
name=$HOST
[[ "$name" == 0.0.0.0 || "$name" == :: ]] && name=localhost
[[ "$name" == *:* ]] && name="[$name]"
address="http://$name:$PORT"
healthy() {
    "$PYTHON" - "$address/healthz" 2> /dev/null << 'END'
import sys
import urllib.request

urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=60)
END
}
end_of_log() {
    say "the end of $LOG_FILE:" >&2
    tail -n 20 "$LOG_FILE" >&2
}
shown=0
SECONDS=0
until healthy; do
    if ! kill -0 "$pid" 2> /dev/null; then
        give_up
        end_of_log
        fail "the server ended"
    fi
    if ((SECONDS > WAIT_SECONDS)); then
        give_up
        end_of_log
        fail "the server was not healthy within $WAIT_SECONDS s and has been stopped"
    fi
    if ((SECONDS >= shown + 5)); then
        shown=$SECONDS
        say "waiting ($SECONDS s): $(tail -n 1 "$LOG_FILE")"
    fi
    sleep 0.5
done

trap - INT TERM HUP
[[ -e "$CONFIG" ]] && mv "$CONFIG" "$CONFIG.bak"
mv "$NEW_CONFIG" "$CONFIG"

say "healthy after $SECONDS s"
say "  settings $CONFIG"
say "  speech   $address/inference_zero_shot"
say "  health   $address/healthz"
say "  metrics  $address/metrics"
