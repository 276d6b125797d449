#!/usr/bin/env bash
# GPT-2 (124M) with RoPE on 10B tokens of FineWeb-Edu: from an empty machine with 4 x H100 and a
# network to a trained, evaluated, sampled and exported model.
#
#     bash runs/gpt2_4xh100.sh
#
# Expected: validation loss 2.987, HellaSwag 0.320 (published, one seed; not measured here).
# Time: 1.3 to 1.7 hours of training (computed: 8.6e18 FLOP at 35 to 45% MFU), and preparation.
# Disk: 20 GB of shards, 5 GB more while they are made, 6 GB of checkpoints (computed).
#
# After an interruption the same command continues where it was, in preparation and in training.
# Another preset, directory of shards or number of GPUs:
#     PRESET=gpt2-baseline DATA=/disk/fineweb-edu-10BT GPUS=8 bash runs/gpt2_4xh100.sh
# On a GPU without peer-to-peer copies, or when NCCL hangs: NCCL_P2P_DISABLE=1 in front.
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'exit 130' INT # Ctrl-C ends this script, too: the run stops with a checkpoint

preset=${PRESET:-gpt2-rope}
data=${DATA:-data/fineweb-edu-10BT}
gpus=${GPUS:-4}
run=log/$preset

pip install -r requirements.txt
python prepare.py fineweb-edu --sample 10BT --out "$data"
python audit.py "$data" --preset "$preset" --world_size "$gpus"

# Mistakes end here: in the loop below torchrun's exit status does not tell them from a crash.
python train_gpt2.py "$preset" --data_root "$data" --dry_run True

# The exit status does not tell whether the run is finished, either; finished.json does.
launches=0
rm -f "$run/diverged.json" # of an earlier launch
until [ -e "$run/finished.json" ]; do
    if [ -e "$run/diverged.json" ]; then
        exit 3 # to NaN; another launch would end the same
    fi
    launches=$((launches + 1))
    if [ "$launches" -gt 100 ]; then
        echo "error: not finished after 100 launches; hint: the messages above" >&2
        exit 1
    fi
    torchrun --standalone --nproc_per_node="$gpus" train_gpt2.py "$preset" --data_root "$data" ||
        sleep 10
done

python hellaswag.py --model "$run" --out "$run/hellaswag.json"
python generate.py --model "$run" --prompt "Hello, I'm a language model," --n 4
if [ ! -e "$run/hugging-face" ]; then
    python hf.py export "$run" "$run/hugging-face"
fi
