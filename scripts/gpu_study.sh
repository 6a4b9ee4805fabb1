#!/usr/bin/env bash
# Runs of a study on every GPU of a machine that is lent for minutes: scripts/gpu_study.sh STUDY.yaml OUT RUN...
#
# RUN is a name of the study (RECIPE-ROPE-SEED), best first: $EACH (4) at a time on each of $GPUS (all there are). Called where
# the study's relative paths hold (the model, books/, short/), with ard-serve on PYTHONPATH. Every 8 s OUT/study.tar.gz is
# replaced by what there is: results, evaluations, metrics and settings of every run, logs. Nothing begins after $BUDGET_S (540)
# less $NEEDS_S (0; what a run takes), and at $BUDGET_S all ends: a training saves a checkpoint in $WORK (/tmp/study), from which
# the same call goes on while the machine stays, and an evaluation that was not over is lost. Results name no commit where there is
# no git: set it before they are merged (scripts/record_quality.py --merge).
# On an H200 four runs of SmolLM2-135M at 4.25M tokens on one card took 490 s with their evaluations, three 325 s.
set -euo pipefail
study=$(realpath "${1:?usage: gpu_study.sh STUDY.yaml OUT RUN...}") out=${2:?}
shift 2
python=${PYTHON:-python3} work=${WORK:-/tmp/study} budget=${BUDGET_S:-540} needs=${NEEDS_S:-0}
gpus=${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader)}
results=$work/results
mkdir -p "$out" "$results/logs"
out=$(realpath "$out")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1

collect() { # one file, since few may come back, put in its place whole
  (cd "$work" && find . \( -name '*.json' -o -name '*.jsonl' -o -name '*.yaml' -o -name '*.log' -o -name '*.failed' \) \
    -size -4096k ! -name held-out.jsonl ! -name 'tokenizer*' ! -path '*/checkpoints/*' -print0 | tar -czf study.part --null -T -) || [ $? = 1 ] # 1: a log grew
  cp "$work/study.part" "$out/study.part" && mv "$out/study.part" "$out/study.tar.gz"
}

for run in "$@"; do
  echo "$run $python -m scripts.study $study --out $work/runs --results $results --minutes $((budget / 60 + 1)) --runs $run"
done >"$work/list"
# shellcheck disable=SC2086
setsid timeout --kill-after=20 "$budget" "$python" -m scripts.gpu_queue "$work/list" --logs "$results/logs" --gpus $gpus --each "${EACH:-4}" \
  --minutes "$(((budget - needs) / 60))" &
queue=$!
while kill -0 $queue 2>/dev/null; do
  sleep 8
  collect
done
collect
cat "$results/logs/queue.log"
