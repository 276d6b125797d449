#!/usr/bin/env bash
# GPT-2 (124M) with RoPE on two machines of 8 GPUs. Run it on both, in the repository:
#
#     NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash runs/two_machines.sh      on the machine 10.0.0.1
#     NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash runs/two_machines.sh      on the other one
#
# Both need the same code and the same shards in data/fineweb-edu-10BT (prepare.py); their
# fingerprints are compared at the start. Records, checkpoints and HellaSwag are the first
# machine's, so it stays the same one when a run is resumed. MASTER_PORT (29500) must be open
# between the machines, and their network should be fast: gradients cross it once per step, 0.5 GB.
# Name the interface when a machine has several: NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0;
# NCCL_DEBUG=INFO prints which one was chosen.
# Expected: as runs/gpt2_4xh100.sh, with the same batches. Tested as two launches with gloo on one
# machine; several machines, and NCCL between them, have not been tried.
#
# Options go to train_gpt2.py. B is 32, because 64 x 1024 x 16 exceeds the batch of 524,288 tokens.
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'exit 130' INT # Ctrl-C ends this script, too: the run stops with a checkpoint

: "${NODE_RANK:?0 on the first machine, 1 on the second}"
: "${MASTER_ADDR:?the address of the first machine}"
preset=${PRESET:-gpt2-rope}

# Mistakes end here: in the loop below torchrun's exit status does not tell them from a crash.
python train_gpt2.py "$preset" --B 32 --device cuda "$@" --dry_run True

# A machine that lost the other one starts again and waits for it. torchrun's exit status is 0
# only when all processes are done; its messages tell theirs.
launches=0 # in a row without a new checkpoint
progress=" | saved "
if [ "$NODE_RANK" != 0 ]; then
    progress="exitcode" # this machine saves none: that the first one was there must do
fi
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
until torchrun --nnodes=2 --nproc_per_node="${GPUS:-8}" --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" \
    train_gpt2.py "$preset" --B 32 --device cuda "$@" 2>&1 | tee -i "$messages"; do
    if grep -q "exitcode *: 3 " "$messages"; then
        exit 3 # to NaN; another launch would end the same
    fi
    launches=$((launches + 1))
    if grep -q "$progress" "$messages"; then
        launches=0
    fi
    if [ "$launches" -ge 3 ]; then
        echo "error: 3 launches in a row without a new checkpoint; hint: the messages above" >&2
        exit 1
    fi
    sleep 10
done
