#!/usr/bin/env bash
# Two decode processes. MODEL_DIR and PORT from the environment; appended flags take precedence.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

exec "$PYTHON" -m light_tts.server.api_server \
    ${MODEL_DIR:+--model_dir "$MODEL_DIR"} --port "${PORT:-8080}" \
    --encode_paral_num 4 --decode_process_num 2 --decode_paral_num 2 --decode_max_batch_size 4 \
    --gpt_paral_num 100 --gpt_paral_step_num 200 --max_total_token_num 65536 --max_req_total_len 32768 \
    --router_max_wait_tokens 8 --cache_capacity 200 --load_trt True \
    --mode triton_flashdecoding --httpserver_workers 3 "$@"
