#!/usr/bin/env bash
# Three decode processes and int8 KV. MODEL_DIR and PORT from the environment; appended flags take precedence.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

exec "$PYTHON" -m light_tts.server.api_server \
    ${MODEL_DIR:+--model_dir "$MODEL_DIR"} --port "${PORT:-8080}" \
    --encode_paral_num 6 --decode_process_num 3 --decode_paral_num 2 --decode_max_batch_size 3 \
    --gpt_paral_num 150 --gpt_paral_step_num 300 --max_total_token_num 98304 --max_req_total_len 32768 \
    --router_max_wait_tokens 6 --cache_capacity 300 --load_trt True \
    --mode triton_flashdecoding,triton_int8kv --httpserver_workers 4 --log_stats_interval 10 "$@"
