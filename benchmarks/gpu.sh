#!/usr/bin/env bash
# What this project checks and measures on one GPU, in under 9 minutes.
#
#   benchmarks/gpu.sh OUT
#
# Every piece has a time limit and a file of its own in OUT; a piece whose file is there is left out, so that a run that
# was cut off goes on where it was. First come the tests that need CUDA, then step times: ResNet-50 at 224 and ResNet-18
# at 32, bf16, channels_last, local batches 4 to 256; attacks inline and on a second stream; what torch.compile changes;
# the engine against a plain loop; optimizers; a timeline with each executor; and one
# run with an automatic micro-batch, compiled, with mixup, an average of the weights and precise batch norm.
set -uo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT=${1:?OUT: the folder for the results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$ROOT" || exit 2
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu.sh: $PYTHON sees no CUDA device (PYTHON=... names another one)." >&2
    exit 2
}

piece() { # FILE SECONDS COMMAND...
    local file=$1 limit=$2 begin=$SECONDS
    shift 2
    if [ -s "$OUT/$file" ]; then
        echo "== $file is there"
        return
    fi
    timeout "$limit" "$@" >"$OUT/${file%.*}.log" 2>&1
    echo "== $file: exit code $?, $((SECONDS - begin)) s"
    tail -n 40 "$OUT/${file%.*}.log"
}

bench() { # FILE SECONDS ARGUMENTS...
    local file=$1 limit=$2
    shift 2
    piece "$file" "$limit" "$PYTHON" -m conadv bench "$@" --device cuda --out "$OUT/$file"
}

pictures() {
    for executor in inline stream; do
        "$PYTHON" -m conadv train digits --method conadv --lookahead --steps 60 --device cuda --quiet --overwrite \
            --executor "$executor" --out "$OUT/runs/$executor" &&
            "$PYTHON" -m conadv timeline "$OUT/runs/$executor" --out "$OUT/timeline-$executor" || return 1
    done
    echo done >"$OUT/timelines.done"
}

features() { # what else has a part of its own on CUDA, in one run
    "$PYTHON" -m conadv doctor --json >"$OUT/doctor.json" # exit code 1: findings
    "$PYTHON" -m conadv train digits --method conadv --lookahead --steps 60 --device cuda --quiet --overwrite \
        --micro-batch-size auto --compile --precision bf16 --channels-last --ema.decay 0.9 --mixup 0.2 \
        --eval.precise-bn-images 500 --out "$OUT/runs/features" && cp "$OUT/runs/features/summary.json" "$OUT/features.json"
}
export -f pictures features
export OUT PYTHON

methods=(vanilla noise disadv conadv conadv-lookahead recycle)
common=(--precision bf16 --channels-last --rounds 6 --burst 4)
photos=(--model resnet50 --image-size 224 --classes 1000 "${common[@]}")
small=(--model resnet18 --image-size 32 "${common[@]}")

piece tests.xml 110 "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml "$OUT/tests.xml" \
    tests/test_cuda.py tests/test_optim.py tests/test_norm.py tests/test_compile.py
bench resnet18-32.json 80 attack-cost "${small[@]}" --batches 4 16 64 256 --methods "${methods[@]}" --executors inline stream
bench resnet50-224.json 130 attack-cost "${photos[@]}" --batches 4 16 64 256 --methods "${methods[@]}" --executors inline stream
bench resnet50-224-compile.json 60 attack-cost "${photos[@]}" --batches 64 --methods vanilla noise conadv --compile
for what in engine optim; do
    piece "$what.json" 40 "$PYTHON" benchmarks/micro.py "$what" --device cuda --out "$OUT/$what.json"
done
piece timelines.done 25 bash -c pictures
piece features.json 45 bash -c features
