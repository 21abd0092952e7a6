#!/usr/bin/env bash
# What an attack costs on two hosts with a real link between them, by the rate of the link.
#
#   benchmarks/two_hosts.sh [--out DIR] [--per-host N] [--force] [RATE...] [-- OPTIONS OF conadv bench attack-cost]
#
# The hosts are two network namespaces of this machine with a core (or N) each. A veth pair joins them; each end sends
# at RATE Mbit/s at most (tc tbf), "none" is without limit. Default: none 3200 1600 800 400, about 10 minutes on 2
# cores. Every rate is measured once: DIR (default runs/two_hosts) has a JSON per rate, and a rate that has one is left
# out unless --force is given. DIR/two_hosts.json has all rates together, drawn as two_hosts.svg.
#
# Needs Linux, root, and ip and tc (iproute2). Whatever ends the script, also Ctrl-C, it takes its namespaces and the
# processes in them along; it touches nothing else.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
HERE=$ROOT/benchmarks
PYTHON=${PYTHON:-python3}
ADDRESS=(10.213.77.1 10.213.77.2) # seen inside the namespaces only
PORT=29500
DEVICE=conadv0
BENCH=(--model resnet18 --batches 16 --overlap both --methods vanilla noise disadv conadv conadv-lookahead
    --rounds 15 --burst 2 --threads 1)

out=runs/two_hosts
per_host=1
force=
rates=()
namespaces=()

fail() {
    echo "two_hosts.sh: $1" >&2
    exit "${2:-2}"
}

read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --out) out=${2:?--out needs a folder} && shift ;;
            --per-host) per_host=${2:?--per-host needs a number} && shift ;;
            --force) force=1 ;;
            --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
            --) shift && BENCH+=("$@") && break ;;
            none) rates+=(none) ;;
            *[!0-9]* | 0* | '') fail "the rate '$1' is neither a number of Mbit/s nor none (see --help)." ;;
            *) rates+=("$1") ;;
        esac
        shift
    done
    [[ $per_host =~ ^[1-9][0-9]*$ ]] || fail "--per-host '$per_host' must be 1 or more."
    [ ${#rates[@]} -gt 0 ] || rates=(none 3200 1600 800 400)
}

check_machine() {
    [ "$(id -u)" = 0 ] || fail "network namespaces need root: run it with sudo (and PYTHON=... for your environment)."
    for tool in ip tc taskset; do
        command -v "$tool" >/dev/null || fail "there is no '$tool' here: install iproute2 and util-linux."
    done
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' 2>/dev/null || fail "$PYTHON has no torch: give PYTHON=path/of/your/python."
}

# ---- the link

make_link() { # RATE
    local name
    name=conadv-$(od -An -N4 -tx4 /dev/urandom | tr -d ' ')
    for host in 0 1; do
        ip netns add "$name-$host"
        namespaces+=("$name-$host")
    done
    ip link add "$DEVICE" netns "$name-0" type veth peer name "$DEVICE" netns "$name-1"
    for host in 0 1; do
        ip -n "$name-$host" addr add "${ADDRESS[host]}/30" dev "$DEVICE"
        ip -n "$name-$host" link set lo up
        ip -n "$name-$host" link set "$DEVICE" up
        # a bucket of 2 ms: small beside a message of gradients, large beside the packets that the kernel sends at once
        [ "$1" = none ] || ip netns exec "$name-$host" tc qdisc add dev "$DEVICE" root tbf rate "$1mbit" \
            burst "$(($1 * 250 > 131072 ? $1 * 250 : 131072))" latency 50ms
    done
}

stop() { # end every process in our namespaces, politely at first
    local signal pids
    for signal in TERM KILL; do
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            pids=$(for name in "${namespaces[@]}"; do ip netns pids "$name" 2>/dev/null || true; done)
            [ -n "$pids" ] || return 0
            # shellcheck disable=SC2086
            kill -"$signal" $pids 2>/dev/null || true
            sleep 0.3
        done
    done
}

remove_link() {
    stop
    for name in "${namespaces[@]}"; do ip netns del "$name" 2>/dev/null || true; done
    namespaces=()
}

# ---- what runs on it

cores_of() { # HOST -> a list for taskset: N cores of its own where there are enough, half of them otherwise
    "$PYTHON" - "$1" "$per_host" <<'PY'
import os, sys
host, count = map(int, sys.argv[1:])
cores = sorted(os.sched_getaffinity(0))
share = min(count, len(cores) // 2)
print(",".join(map(str, cores[host * share : (host + 1) * share] or cores)))
PY
}

on_both() { # LOG COMMAND...: run it on both hosts, which know themselves by $HOST; the first that fails ends both
    local log=$1 host status=0
    shift
    for host in 0 1; do
        HOST=$host GLOO_SOCKET_IFNAME=$DEVICE OMP_NUM_THREADS=1 ip netns exec "${namespaces[host]}" \
            taskset -c "${cores[host]}" "$@" >"$log.host$host.log" 2>&1 &
    done
    for _ in 0 1; do
        wait -n || { status=$? && stop && break; }
    done
    [ $status = 0 ] || { tail -n 15 "$log".host?.log >&2 && fail "failed at rate $rate (status $status), see above." 1; }
}

measure() { # RATE
    local result=$out/.bench-$1.json
    rm -f "$result"
    export RESULT=$result MASTER=${ADDRESS[0]}
    on_both "$out/link-$1" bash -c '"$0" "$1" probe "$HOST" "$2" "$3"' \
        "$PYTHON" "$HERE/two_hosts.py" "$MASTER" "$out/.link-$1.json"
    if [ -n "${CONADV_TWO_HOSTS_COMMAND:-}" ]; then # another program in place of the benchmark, for tests
        on_both "$out/rate-$1" bash -c "$CONADV_TWO_HOSTS_COMMAND"
    else
        on_both "$out/rate-$1" bash -c '"$0" -m torch.distributed.run --nnodes 2 --node-rank "$HOST" "$@"' "$PYTHON" \
            --nproc-per-node "$per_host" --master-addr "$MASTER" --master-port $PORT \
            -m conadv bench attack-cost "${BENCH[@]}" --out "$result"
    fi
    "$PYTHON" "$HERE/two_hosts.py" join "$1" "$result" "$out/.link-$1.json" "$out/rate-$1.json"
    rm -f "$result" "$out/.link-$1.json"
}

read_arguments "$@"
check_machine
mkdir -p "$out"
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
cores=("$(cores_of 0)" "$(cores_of 1)")
trap 'trap "" INT TERM HUP; remove_link' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

files=()
for rate in "${rates[@]}"; do
    files+=("$out/rate-$rate.json")
    if [ -s "$out/rate-$rate.json" ] && [ -z "$force" ]; then
        echo "rate $rate: $out/rate-$rate.json is there (--force measures again)"
        continue
    fi
    echo "rate $rate: $(date +%T)"
    make_link "$rate"
    measure "$rate"
    remove_link
done
"$PYTHON" "$HERE/points.py" two-hosts "$out/two_hosts.json" "${files[@]}"
"$PYTHON" "$HERE/two_hosts.py" draw "$out/two_hosts.json" "$out/two_hosts.svg"
