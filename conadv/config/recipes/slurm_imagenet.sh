#!/bin/bash
# ImageNet at a large batch on nodes of 8 GPUs. conadv slurm > job.sh, set the lines below for your cluster, then:
#     DATA=/folder/with/train/and/val sbatch job.sh
#     DATA=/folder/with/train/and/val OPTIONS='--method noise' sbatch --job-name noise job.sh
# Every setting of sbatch may also be given there: sbatch --nodes 1 --time 2-00:00:00 --partition NAME job.sh
#SBATCH --job-name=train
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
#SBATCH --output=conadv-%j.log
set -euo pipefail

RECIPE=${RECIPE:-imagenet_resnet50_32k}  # conadv recipes
DATA=${DATA:?folder with train/ and val/, the same images on every node}
# The run: on a file system that all nodes share; `conadv train --dry-run` says how large. Not named by the job's number,
# so that a job sent once more goes on; another method or recipe's settings need a job name (or OUT) of their own.
OUT=${OUT:-$PWD/runs/$RECIPE/$SLURM_JOB_NAME}
OPTIONS=${OPTIONS---method conadv --lookahead}    # any option of: conadv train RECIPE --help
PYTHON=${PYTHON:-python}                 # or activate an environment in this line
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0    # where host names do not lead to the fast network

# Slurm asks the tasks to stop so many seconds before the time is over, the number in --signal above: enough for a step,
# an evaluation and a checkpoint. The run says in its log when it takes longer than this. A pre-empting partition's
# GraceTime must be as long.
export CONADV_GRACE_SECONDS=600

# One task is one rank, without torchrun between: it would kill its processes 30 seconds after SIGTERM, whatever Slurm
# grants. The first node is the meeting point; the port is the job's own, below those that Linux gives to clients.
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${#HOSTS[@]} != SLURM_JOB_NUM_NODES)); then
    echo "$0: scontrol names ${#HOSTS[@]} hosts of $SLURM_JOB_NUM_NODES" >&2
    exit 1
fi
export MASTER_ADDR=${HOSTS[0]} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) OMP_NUM_THREADS=1
# shellcheck disable=SC2016  # each task has its own numbers
AS_RANK='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-8}
exec "$@"'

# --auto-resume: a requeued or repeated job goes on from its newest checkpoint, and starts if there is none yet.
# srun does not take over the job's --cpus-per-task in every version of Slurm, nor --export where sbatch had another.
code=0
# shellcheck disable=SC2086  # OPTIONS are words of the command
srun --export=ALL --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c "$AS_RANK" task \
    "$PYTHON" -m conadv train "$RECIPE" --data "$DATA" --out "$OUT" --auto-resume $OPTIONS || code=$?

# 143: stopped by SIGTERM, with a checkpoint. Slurm itself requeues no job that is out of time. scancel ends this script
# too, and so nothing is requeued then.
if ((code == 143)); then
    echo "$0: stopped at $(date), requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
