#!/usr/bin/env bash
# The server's GPU measurements, each within one call of ten minutes: scripts/gpu_server.sh STEP MODEL OUT_DIR
#
#   packages   which modules our server lacks here; the next two lines bring them as one folder (made where there is a registry):
#              scripts/gpu_server.sh pack - OUT_DIR    writes OUT_DIR/server-site.tar.xz for Python 3.12 (about 8 MB)
#              mkdir site && tar -xJf server-site.tar.xz -C site && export PYTHONPATH=$PWD/site:$PYTHONPATH
#   faults     rows S1-S23 on this vLLM, MODEL or `tiny` for a random Llama     -> OUT_DIR/server-faults-gpu.json (8 minutes)
#   overhead   64 streams straight and through the gateway, in turns            -> OUT_DIR/server-overhead-gpu.json (6 minutes)
#   long       MODEL at 65,536 tokens, prompts to the window, four at once      -> OUT_DIR/server-long.json (8 minutes)
#   tp2        the same on two GPUs with --tensor-parallel-size 2               -> OUT_DIR/server-tp2.json (8 minutes)
# COMMIT=$(git rev-parse HEAD) of the copied tree goes into the results. vLLM comes with ../shared/gpu/pack_vllm.sh; its folder goes on PYTHONPATH as well, behind this one. Run from the repository's root.
# Its list (../shared/gpu/vllm-gpu.txt) has fastapi, httptools, pydantic, starlette and uvicorn, which we need, but not uvloop, rich,
# psutil, prometheus-client, pyyaml, tokenizers and httpx: a machine with transformers has some of them, `packages` says which.
set -euo pipefail
step=${1:?usage: gpu_server.sh STEP MODEL OUT_DIR} model=${2:?} out=${3:?}
mkdir -p "$out"
export VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1 PYTHONPATH=tests:.:${PYTHONPATH:-}
needed="fastapi h11 httptools httpx numpy prometheus_client psutil pydantic yaml rich tokenizers uvicorn uvloop"
case $step in
packages)
    for name in $needed; do python3 -c "import $name" 2>/dev/null || echo "missing: $name"; done ;;
pack)
    names='uvloop|rich|markdown-it-py|mdurl|pygments|psutil|prometheus_client|pyyaml|tokenizers|huggingface_hub|httpx|httpcore|h11|anyio'
    work=$(mktemp -d)
    grep -iE "^($names|certifi|idna)==" requirements/cpu.lock > "$work/list.txt"
    platforms=$(for i in $(seq 17 39); do printf -- '--platform manylinux_2_%s_x86_64 ' "$i"; done)
    # shellcheck disable=SC2086
    python3 -m pip install -q --no-deps --no-compile --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 \
        --abi abi3 --abi none $platforms --platform manylinux2014_x86_64 --target "$work/site" -r "$work/list.txt"
    tar -C "$work/site" -cJf "$out/server-site.tar.xz" . && rm -r "$work" && ls -l "$out/server-site.tar.xz" ;;
faults)
    if [ "$model" = tiny ]; then python3 tests/real_faults.py "$out/server-faults-gpu.json"
    else python3 tests/real_faults.py "$out/server-faults-gpu.json" --model "$model"; fi ;;
overhead) python3 tests/bench_server.py "$out/server-overhead-gpu.json" real "$model" ;;
long) python3 tests/bench_server_long.py "$model" "$out/server-long.json" --window 65536 -- --enforce-eager ;;
tp2) python3 tests/bench_server_long.py "$model" "$out/server-tp2.json" --window 65536 --gpus 2 -- --enforce-eager ;;
*) echo "unknown step $step; see the head of this file" >&2; exit 2 ;;
esac
