#!/usr/bin/env bash
# Train on NODES machines with GPUS processes each: the same command on every machine.
#
#   NODES=2 GPUS=8 HEAD=node0 scripts/torchrun.sh pretrain --recipe b7 --engine zero --zero-stage 2
#
# NODES  how many machines (1)
# GPUS   processes on each (auto: one for each GPU)
# HEAD   name or address of the machine where all meet, the first one (localhost)
# PORT   a free port there (29500)
# JOB    a name, the same everywhere, another one for another run (minillm)
#
# The folder of runs (--runs) must be the same on all machines: checkpoints and token shards are read from it.
set -euo pipefail
exec torchrun \
    --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-auto}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id "${JOB:-minillm}" \
    --module minillm.cli "$@"
