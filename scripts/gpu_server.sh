#!/usr/bin/env bash
# The server's GPU measurements, each within one call of ten minutes: scripts/gpu_server.sh STEP MODEL OUT_DIR [MORE FLAGS]
#
#   packages   which modules our server lacks here; the next two lines bring them as one folder (made where there is a registry):
#              scripts/gpu_server.sh pack - OUT_DIR    writes OUT_DIR/server-site.tar.xz for Python 3.12 (6 MB)
#              mkdir site && tar -xJf server-site.tar.xz -C site && export PYTHONPATH=$PYTHONPATH:$PWD/site
#   faults     rows S1-S23 on this vLLM, MODEL or `tiny` for a random Llama     -> OUT_DIR/server-faults-gpu.json (8 minutes)
#   overhead   64 streams straight and through the gateway, in turns            -> OUT_DIR/server-overhead-gpu.json (6 minutes)
#   throughput pairs of equal blocks, straight and through the gateway, on the vLLM at --engine URL (4 minutes)
#                                                                               -> OUT_DIR/server-throughput-gpu.json
#   long       MODEL at 65,536 tokens, prompts to the window, four at once      -> OUT_DIR/server-long.json (8 minutes)
#   tp2        the same on two GPUs with --tensor-parallel-size 2               -> OUT_DIR/server-tp2.json (8 minutes)
# On H100s with vLLM 0.23 every step has run; S22 of the faults alone has not come to its end there. The results: docs/results/server-*-h100.json.
# All of it side by side in one call, with one engine for the load test: scripts/gpu_serving.sh.
# COMMIT=$(git rev-parse HEAD) of the copied tree goes into the results. vLLM comes with ../shared/gpu/pack_vllm.sh; its folder goes on PYTHONPATH as well, before this one. Run from the repository's root.
# Its list (../shared/gpu/vllm-gpu.txt) has fastapi, httptools, pydantic, starlette and uvicorn, which we need, but not uvloop, rich,
# psutil, prometheus-client, pyyaml and httpx: a machine with transformers has some of them, `packages` says which. tokenizers,
# huggingface-hub and numpy stay out of the pack: transformers there must find those it was installed with.
set -euo pipefail
step=${1:?usage: gpu_server.sh STEP MODEL OUT_DIR} model=${2:?} out=${3:?}
shift 3
mkdir -p "$out"
export VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1 PYTHONPATH=tests:.:${PYTHONPATH:-}
python=${PYTHON:-python3}
needed="anyio certifi fastapi h11 httpcore httptools httpx idna markdown_it matplotlib mdurl numpy prometheus_client psutil pydantic pygments
  rich tokenizers typing_extensions uvicorn uvloop yaml"
window=${WINDOW:-65536}
read -ra engine_flags <<<"${ENGINE_FLAGS:-}"
case $step in
packages)
    # shellcheck disable=SC2086
    "$python" -c 'import importlib.util as u, sys
for name in sys.argv[1:]: u.find_spec(name) or print("missing:", name)' $needed ;;
pack)
    work=$(mktemp -d)
    scripts/pack_wheels.sh "$work/site" anyio certifi h11 httpcore httpx idna markdown-it-py mdurl prometheus_client psutil pygments \
        pyyaml rich typing_extensions uvloop
    tar -C "$work/site" -cJf "$out/server-site.tar.xz" . && rm -r "$work" && ls -l "$out/server-site.tar.xz" ;;
faults)
    if [ "$model" != tiny ]; then set -- --model "$model" "$@"; fi
    "$python" tests/real_faults.py "$out/${NAME:-server-faults-gpu}.json" "$@" -- "${engine_flags[@]}" ;;
overhead) "$python" tests/bench_server.py "$out/server-overhead-gpu.json" real "$model" "$@" ;;
throughput) "$python" tests/bench_server_throughput.py "$out/server-throughput-gpu.json" "$model" "$@" ;;
long)
    "$python" tests/bench_server_long.py "$model" "$out/server-long.json" --window "$window" "$@" -- --enforce-eager "${engine_flags[@]}" ;;
tp2)
    # Kept off wherever NVLink multicast is not to be used; the smallest messages of a decode go by it otherwise.
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} VLLM_ALLREDUCE_USE_SYMM_MEM=0
    "$python" tests/bench_server_long.py "$model" "$out/server-tp2.json" --window "$window" --gpus 2 "$@" -- \
        --enforce-eager "${engine_flags[@]}" ;;
*) echo "unknown step $step; see the head of this file" >&2; exit 2 ;;
esac
