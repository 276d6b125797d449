#!/usr/bin/env bash
# GPT-2 (124M) with RoPE under Slurm, on one machine with 4 GPUs, however short the time limit:
# two minutes before its end the run saves a checkpoint, and the job queues itself again.
#
#     sbatch runs/slurm.sh
#     sbatch --nodes=2 runs/slurm.sh --B 32          on two machines; options go to train_gpt2.py
#
# Run it in the repository, with shards in data/fineweb-edu-10BT (prepare.py) and python of the
# environment that has the requirements. On several machines the code and the shards are needed on
# each; records and checkpoints are written by the first one, so log/ should be on a shared disk.
# Expected: as runs/gpt2_4xh100.sh. Not tried on a cluster; a test replaces srun and scontrol.
#
# srun starts one process per GPU, without torchrun: so Slurm's signals reach the training
# processes themselves (torchrun ends at SIGUSR1), and their exit status is seen here.
#SBATCH --job-name=gpt2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

preset=${PRESET:-gpt2-rope}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
WORLD_SIZE=$SLURM_NTASKS
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MASTER_ADDR MASTER_PORT WORLD_SIZE OMP_NUM_THREADS

crashes=0
while true; do
    status=0
    # from Slurm 22.05 on srun does not always get the batch's --cpus-per-task
    # shellcheck disable=SC2016  # the task's shell expands these
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
        bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train_gpt2.py "$@"' \
        train "$preset" --device cuda "$@" || status=$?
    case $status in
    0)
        exit 0
        ;;
    75 | 138) # stopped by a signal, with a checkpoint; 138: by SIGUSR1 while it started
        exec scontrol requeue "$SLURM_JOB_ID"
        ;;
    2 | 3) # a mistake, or a run that has diverged: another launch would end the same
        exit "$status"
        ;;
    *) # a crash: the next launch resumes from the newest checkpoint
        crashes=$((crashes + 1))
        if [ "$crashes" -gt 10 ]; then
            exit "$status"
        fi
        sleep 10
        ;;
    esac
done
