#!/usr/bin/env bash
# Train with DeepSpeed's own launcher, which starts everything from one machine over ssh.
#
#   HOSTFILE=scripts/hostfile scripts/deepspeed.sh pretrain --recipe b7 --zero-stage 3 --offload
#
# HOSTFILE  the machines and how many GPUs each has; without one, this machine
# GPUS      without a hostfile: how many processes (all GPUs)
# PORT      a free port on the first machine (29500)
#
# Every machine needs the same path to the environment and to the folder of runs, and ssh without a password.
set -euo pipefail
where=(--master_port "${PORT:-29500}" --hostfile "${HOSTFILE:-/nowhere}")
if [[ -n "${GPUS:-}" ]]; then where+=(--num_gpus "$GPUS"); fi
exec deepspeed "${where[@]}" --no_local_rank --module minillm.cli "$@" --engine deepspeed
