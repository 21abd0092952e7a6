#!/usr/bin/env bash
# How to divide the cores of this machine between learners and attack ranks.
#
#   benchmarks/attack_ranks.sh [--out DIR] [--repeats R] [--force] [N:M...] [-- OPTIONS OF conadv bench attack-cost]
#
# N learners and M attack ranks, one thread each; M = 0 attacks inline. Default: 1:0 2:0 1:1 2:1 3:1, about 8 minutes on
# 2 cores. Where there is a core for each rank, each is pinned to its own; otherwise they share all. Splits cannot be
# interleaved within a process, so the whole list is measured R times (default 2) and the rounds are put together. DIR
# (default runs/attack_ranks) has a JSON per split and repeat, which is left out if it is there, unless --force is given,
# and attack_ranks.json with all of them.
#
# Within a split every case is compared with noise on the same learners, while the attack ranks' cores are idle. Between
# splits the honest figure is images per second and core.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
BENCH=(--model resnet20 --batches 8 32 --rounds 4 --burst 3 --threads 1)

out=runs/attack_ranks
repeats=2
force=
splits=()

fail() {
    echo "attack_ranks.sh: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a folder} && shift ;;
        --repeats) repeats=${2:?--repeats needs a number} && shift ;;
        --force) force=1 ;;
        --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
        --) shift && BENCH+=("$@") && break ;;
        *) [[ $1 =~ ^[1-9][0-9]*:[0-9]+$ ]] || fail "'$1' is not a split like 3:1 (learners:attack ranks; see --help)."
            splits+=("$1") ;;
    esac
    shift
done
[[ $repeats =~ ^[1-9][0-9]*$ ]] || fail "--repeats '$repeats' must be 1 or more."
[ ${#splits[@]} -gt 0 ] || splits=(1:0 2:0 1:1 2:1 3:1)
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' 2>/dev/null || fail "$PYTHON has no torch: give PYTHON=path/of/your/python."

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
read -ra cores <<<"$("$PYTHON" -c 'import os; print(*sorted(os.sched_getaffinity(0)))')"
mkdir -p "$out"

measure() { # N M FILE
    local ranks=$(($1 + $2)) methods=(noise disadv conadv conadv-lookahead) pin=()
    [ $ranks -gt ${#cores[@]} ] || pin=("${cores[@]}")
    # shellcheck disable=SC2016
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$ranks" --no-python bash -c '
        read -ra cores <<<"$0"
        [ ${#cores[@]} = 0 ] || exec taskset -c "${cores[LOCAL_RANK]}" "$@"
        exec "$@"' "${pin[*]}" "$PYTHON" -m conadv bench attack-cost "${BENCH[@]}" --methods "${methods[@]}" \
        --attack-ranks "$2" --out "$3" >"${3%.json}.log" 2>&1 || { tail -n 15 "${3%.json}.log" >&2 && fail "$1:$2 failed."; }
}

files=()
for repeat in $(seq "$repeats"); do
    for split in "${splits[@]}"; do
        file=$out/split-${split/:/-}.$repeat.json
        files+=("$file")
        [ -z "$force" ] && [ -s "$file" ] && continue
        echo "$split, repeat $repeat: $(date +%T)"
        measure "${split%:*}" "${split#*:}" "$file"
    done
done
"$PYTHON" "$ROOT/benchmarks/points.py" attack-ranks "$out/attack_ranks.json" "${files[@]}"
