#!/usr/bin/env bash
# The training engine's GPU measurements, each within one call of ten minutes: scripts/gpu_engine.sh STEP OUT_DIR
#
#   packages    which modules the bench lacks here; the next two lines bring them, and bitsandbytes with the library for CUDA 13
#               alone, as one folder (made where there is a registry):
#               scripts/gpu_engine.sh pack OUT_DIR      writes OUT_DIR/engine-site.tar.xz for Python 3.12
#               mkdir site && tar -xJf engine-site.tar.xz -C site && export PYTHONPATH=$PWD/site:$PYTHONPATH
#   small       135M and 1.7B shapes, windows of 4K to 32K                                  (5 minutes)
#   7b          the 7B shape, the same windows                                              (5 minutes)
#   mixed       steps of the default recipe, and a profile of one: what estimates are held to   (5 minutes)
#   reference   LinearARD's own step beside ours, of the checkout in $REFERENCE             (5 minutes)
#   quantised   the 7B shape on a base of 4 and of 8 bit; in 4 bit also as a 24 GB card would hold it     (3 minutes)
#   two         7B by default on one GPU, then on two, replicated, with as much for each    (2.5 minutes, on a machine with two GPUs)
#   equal       losses and weights of two GPUs, replicated and sharded, against those of one    (2 minutes, likewise; needs pytest)
# On an H100 `small`, `7b`, `quantised` and `equal` have run in about that time and `mixed` for 7B at 4K (1.5 minutes), by the same
# commands with --steps 1 or 2; on H200s `reference` and, one by one, the commands of `two` and the first of `quantised`. Results are
# added to OUT_DIR/engine-<gpu>.json;
# bring the file along to add to it. COMMIT=$(git rev-parse HEAD) of the copied tree goes into it. Run from the repository's root.
# Afterwards, with the file in docs/results: pytest tests/test_restore_estimate.py holds estimates of memory and time to it.
set -euo pipefail
step=${1:?usage: gpu_engine.sh STEP OUT_DIR} out=${2:?}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=.:${PYTHONPATH:-}
python=${PYTHON:-python3}
needed="accelerate bitsandbytes datasets numpy peft psutil pydantic rich safetensors tensorboard tokenizers torch transformers triton yaml"
windows="4096 8192 16384 32768"
bench() { # WORDS: `restore.bench` by the command in $launch
    local gpu
    gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu")')
    # shellcheck disable=SC2086
    ${launch:-$python} -m restore.bench --out "$out/engine-$gpu.json" ${COMMIT:+--commit $COMMIT} "$@" ${BENCH_FLAGS:-}
}
case $step in
packages)
    for name in $needed; do "$python" -c "import importlib.util as u; exit(u.find_spec('$name') is None)" || echo "missing: $name"; done ;;
pack)
    work=$(mktemp -d)
    scripts/pack_wheels.sh "$work/site" absl-py accelerate annotated-types bitsandbytes grpcio markdown markdown-it-py mdurl peft \
        protobuf psutil pydantic pydantic_core pygments pyyaml rich tensorboard tensorboard-data-server typing-inspection werkzeug
    find "$work/site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name '*_cpu.so' ! -name '*_cuda130.so' -delete
    tar -C "$work/site" -cJf "$out/engine-site.tar.xz" . && rm -r "$work" && ls -l "$out/engine-site.tar.xz" ;;
# shellcheck disable=SC2086
small) bench --shapes 135m 1.7b --windows $windows ;;
# shellcheck disable=SC2086
7b) bench --shapes 7b --windows $windows ;;
mixed)
    bench --shapes 135m 1.7b --windows 4096 8192 --recipes default
    bench --shapes 7b --windows 4096 8192 --recipes default --profile "$out/engine-profile.txt" ;;
reference)
    # No recipe of ours: the reference brings its own. Longer windows of 7B do not end in time.
    for shape in ${SHAPES:-135m 7b}; do
        bench --shapes $shape --windows 4096 --recipes --steps 1 --reference "${REFERENCE:?a checkout of gracefulning/LinearARD}"
    done ;;
quantised)
    # What a card of 24 GB has left beside CUDA's own: a step that runs within it fits.
    bench --shapes 7b --windows 4096 --recipes default --steps 1 --memory-gib 23 --set quantize=4bit
    for bits in 4bit 8bit; do bench --shapes 7b --windows 4096 --recipes default --steps 1 --set quantize=$bits batch_tokens=65536; done ;;
two)
    # Of as many tokens a GPU, a long window and eight short ones for each: then none waits for another.
    bench --shapes 7b --windows 4096 --recipes default --steps ${STEPS:-1} --set batch_tokens=65536
    launch="$python -m torch.distributed.run --standalone --nproc-per-node ${PROCESSES:-2}"
    bench --shapes 7b --windows 4096 --recipes default --steps ${STEPS:-1} --set batch_tokens=$((65536 * ${PROCESSES:-2})) ;;
equal) "$python" -m pytest -p no:cacheprovider tests/test_restore_parallel.py -m gpu ;;
*) echo "unknown step $step; see the head of this file" >&2; exit 2 ;;
esac
