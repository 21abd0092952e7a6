#!/bin/bash
# ImageNet at a large batch over several nodes of 8 GPUs. Copy it, set the four lines below, then: sbatch slurm_imagenet.sh
#SBATCH --job-name=conadv
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=conadv-%j.log
set -euo pipefail

RECIPE=${RECIPE:-imagenet_resnet50_32k}  # conadv recipes
DATA=${DATA:?folder with train/ and val/, on every node}
OUT=${OUT:-$PWD/runs/$RECIPE-conadv}     # on a file system that all nodes share
OPTIONS="--method conadv --lookahead"    # any option of: conadv train RECIPE --help

# One torchrun per node. The first node is the meeting point; the port is the job's own.
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

# SIGTERM, two minutes before the time is over or at a pre-emption, saves after the present step and ends the run.
# --auto-resume: a requeued or repeated job goes on from its newest checkpoint, and starts if there is none yet.
# srun does not take over the job's --cpus-per-task in every version of Slurm.
# shellcheck disable=SC2086  # OPTIONS are words of the command
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HOST:$PORT" \
    -m conadv train "$RECIPE" --data "$DATA" --out "$OUT" --auto-resume $OPTIONS
