#!/usr/bin/env bash
# Measures the whole server on this machine's GPU: full-size checkpoint with random weights, real server, load
# generator. Writes tables and JSON files to a directory.
#   bash scripts/bench_gpu.sh OUT_DIR [flags for the server]
# MODEL_DIR: a checkpoint to use or create (default /tmp/light-tts-full); STREAM, WHOLE: concurrencies to
# measure (empty: none); RATE_SECONDS: duration per rate in the search for the highest one (0: no search);
# PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: bench_gpu.sh OUT_DIR [flags for the server]}
shift
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # an installation is not needed
model_dir=${MODEL_DIR:-/tmp/light-tts-full}
port=${PORT:-8080}
preset=${PRESET:-short5s}
mkdir -p "$out"

[ -e "$model_dir" ] || "$python" scripts/make_tiny_checkpoint.py --out "$model_dir" --size full
"$python" -m light_tts.server.api_server --model_dir "$model_dir" --host 127.0.0.1 --port "$port" \
    --log_dir "$out/logs" --spk_dir "$out/voices" --load_trt False --httpserver_workers 2 \
    --gpt_paral_num 128 --decode_max_batch_size 16 --decode_paral_num 2 --stream_hop grow "$@" \
    >"$out/server.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT

echo "waiting for the server (its output: $out/server.log)"
begin=$SECONDS
until "$python" -c "import sys, urllib.request as r; r.urlopen('http://127.0.0.1:$port/readiness')" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || { tail -30 "$out/server.log"; echo "the server ended"; exit 1; }
    [ $((SECONDS - begin)) -lt 600 ] || { tail -30 "$out/server.log"; echo "not ready after 600 s"; exit 1; }
    sleep 0.5
done
echo "ready after $((SECONDS - begin)) s"
# Each process on the GPU logs two lines: graphs that follow while it is idle, and that they are recorded.
lines() { grep -c "$1" "$out/server.log" || true; }
until [ "$(lines 'CUDA graphs in .* while idle')" -ge "$(lines 'CUDA graphs .* follow while idle')" ]; do
    [ $((SECONDS - begin)) -lt 900 ] || { echo "CUDA graphs are not recorded after 900 s"; exit 1; }
    sleep 0.5
done
echo "all CUDA graphs recorded after $((SECONDS - begin)) s"

measure() {
    "$python" test/benchmark.py --url "http://127.0.0.1:$port" --preset "$preset" --warmup 8 "$@"
}
# Fraction of time in which any kernel ran, over all loads of a sweep.
begin_busy() {
    command -v nvidia-smi >/dev/null || return 0
    nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits -i 0 -lms 100 >"$out/busy.txt" &
    sampler=$!
}
end_busy() {
    [ -n "${sampler:-}" ] || return 0
    kill "$sampler" 2>/dev/null || true
    awk '{ sum += $1 } END { if (NR) printf "GPU busy: %.0f %% of the time\n", sum / NR }' "$out/busy.txt"
}
# A single client, and the stages' own timings afterwards.
measure --stream True --concurrency 1 --number 10 >"$out/one_client.txt" 2>/dev/null
"$python" - "http://127.0.0.1:$port/metrics" >"$out/metrics_one_client.txt" <<'END'
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1]).read().decode())
END
# The same with a stored voice: its prompt is decoded, and cut to whole chunks (--align_prompt).
"$python" - "http://127.0.0.1:$port/add_spk" <<'END'
import io, sys, httpx, numpy, soundfile
samples, rate = soundfile.read("test/golden/cosyvoice2/prompt.wav")
recording = io.BytesIO()
soundfile.write(recording, numpy.resize(samples, int(3.5 * rate)), rate, format="WAV")
voice = {"spk_id": "bench", "prompt_text": "Nobody expected such a fine day in the cold month."}
httpx.post(sys.argv[1], data=voice, files={"prompt_wav": recording.getvalue()}, timeout=60).raise_for_status()
END
measure --spk_id bench --stream True --concurrency 1 --number 10 >"$out/one_client_stored_voice.txt" 2>/dev/null
for stream in True False; do
    [ "$stream" = True ] && loads=${STREAM-1,8,16,32,64} || loads=${WHOLE-1,8,16,32,64}
    [ -z "$loads" ] && continue
    echo "streaming: $stream"
    begin_busy
    measure --stream "$stream" --sweep "$loads" --number "${NUMBER:-16}" \
        --json "$out/stream_$stream.json" --csv "$out/runs.csv" 2>"$out/progress_$stream.log" ||
        { echo "some requests failed:"; tail -5 "$out/server.log"; }
    end_busy
done
if [ "${RATE_SECONDS:-20}" != 0 ]; then
    echo "open loop, streaming: highest rate with P95 of first audio under 400 ms and no player run dry"
    measure --stream True --find_rate --rate 20 --duration "${RATE_SECONDS:-20}" --json "$out/rate.json" \
        2>"$out/progress_rate.log" || { echo "no rate found:"; tail -5 "$out/progress_rate.log"; }
fi
