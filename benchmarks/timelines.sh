#!/usr/bin/env bash
# The timeline pictures of docs/concurrency.md: short runs of ResNet-20 (width 64) on digits, 64 images per learner.
#
#   benchmarks/timelines.sh [--out DIR] [RATE]
#
# single    one process
# disadv    two hosts with a link of RATE Mbit/s (default 400) between them: the attack inside the step
# inline    the same link: the attack beside the gradients' sum
# ranks     one learner and one attack rank on this machine
#
# Needs root for the two hosts, like benchmarks/two_hosts.sh, and 2 cores; about 3 minutes. DIR (default runs/timelines)
# gets the runs, of each a picture, a trace and the record that it is drawn from (NAME.jsonl), and shares.txt.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
out=runs/timelines
[ "${1:-}" != --out ] || { out=${2:?--out needs a folder} && shift 2; }
rate=${1:-400}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHON PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 OUT=$out
export TRAIN="-m conadv train digits --model resnet20 --model.width 64 --micro-batch-size 64 --steps 40 --schedule.warmup-epochs 1 --eval.robust-images 0
    --eval.train-images 100 --threads 1 --quiet --overwrite"
CONADV="--method conadv --lookahead"

torchrun() { "$PYTHON" -m torch.distributed.run --standalone "$@"; }

on_two_hosts() { # NAME OPTIONS...
    export RUN=$1 OPTIONS="${*:2}"
    # shellcheck disable=SC2016
    CONADV_TWO_HOSTS_COMMAND='"$PYTHON" -m torch.distributed.run --nnodes 2 --node-rank "$HOST" --nproc-per-node 1 \
        --master-addr "$MASTER" --master-port 29500 $TRAIN $OPTIONS --global-batch-size 128 --out "$OUT/$RUN"' \
        "$ROOT/benchmarks/two_hosts.sh" --out "$OUT/.two_hosts" --force "$rate" >"$OUT/$RUN.log" 2>&1 || true
    [ -f "$OUT/$RUN/summary.json" ] || { tail -n 15 "$OUT/$RUN.log" >&2 && exit 1; } # the script misses a benchmark's result
}

# shellcheck disable=SC2086
{
    taskset -c 0 "$PYTHON" $TRAIN $CONADV --global-batch-size 64 --out "$out/single"
    on_two_hosts disadv --method disadv
    on_two_hosts inline $CONADV
    torchrun --nproc-per-node 2 $TRAIN $CONADV --global-batch-size 64 --attack-ranks 1 --out "$out/ranks" 2>"$out/ranks.log"
}
for run in single disadv inline ranks; do
    echo "== $run"
    "$PYTHON" -m conadv timeline "$out/$run" --out "$out/$run/timeline"
    cp "$out/$run/timeline/timeline.png" "$out/$run.png"
    grep -E '^\{"type": "(header|step|timeline)"' "$out/$run/record.jsonl" >"$out/$run.jsonl"
done | grep -v -E "^(trace|picture): " | tee "$out/shares.txt"
