#!/usr/bin/env bash
#SBATCH --job-name=minillm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# One launcher on every node of a Slurm job; they meet on the first node.
#
#   sbatch --nodes=4 scripts/slurm.sh pretrain --recipe b7 --engine zero --zero-stage 2
#
# Two minutes before the time is up Slurm sends SIGTERM: the step in progress is finished and saved, and the same
# command goes on from there. Use the `torchrun` of the environment that is active when you submit.
set -euo pipefail
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HOSTS%%$'\n'*} # the first line; a pipe into head would end scontrol by a signal now and then
export HEAD NODES="$SLURM_JOB_NUM_NODES" GPUS="${SLURM_GPUS_ON_NODE:-auto}" PORT=$((20000 + SLURM_JOB_ID % 10000)) JOB="$SLURM_JOB_ID"
exec srun --kill-on-bad-exit=1 "${SLURM_SUBMIT_DIR:-.}/scripts/torchrun.sh" "$@"
