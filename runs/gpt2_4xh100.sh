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
# Start it in tmux: torchrun stops when its terminal closes, even under nohup.
# Another preset, name of the run, directory of shards or number of GPUs:
#     PRESET=gpt2-baseline RUN=second DATA=/disk/fineweb-edu-10BT GPUS=8 bash runs/gpt2_4xh100.sh
# When NCCL hangs: notes/running.md.
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'exit 130' INT # Ctrl-C ends this script, too: the run stops with a checkpoint

preset=${PRESET:-gpt2-rope}
data=${DATA:-data/fineweb-edu-10BT}
gpus=${GPUS:-4}
name=${RUN:-$preset}
run=log/$name

pip install -r requirements.txt
python prepare.py fineweb-edu --sample 10BT --out "$data"
python audit.py "$data" --preset "$preset" --world_size "$gpus"

launch=(torchrun --standalone --nproc_per_node="$gpus" train_gpt2.py "$preset"
    --run_name "$name" --data_root "$data" --device cuda)

# Mistakes end here: in the loop below torchrun's exit status does not tell them from a crash.
"${launch[@]}" --dry_run True

# torchrun's exit status alone does not tell whether the run is finished; finished.json does.
launches=0 # in a row without a new checkpoint
checkpoints=("$run"/ckpt/step_*)
newest=${checkpoints[-1]}
rm -f "$run/diverged.json" # of an earlier launch
until "${launch[@]}" && [ -e "$run/finished.json" ]; do
    if [ -e "$run/diverged.json" ]; then
        exit 3 # to NaN; another launch would end the same
    fi
    launches=$((launches + 1))
    checkpoints=("$run"/ckpt/step_*)
    if [ "${checkpoints[-1]}" != "$newest" ]; then
        newest=${checkpoints[-1]}
        launches=0
    fi
    if [ "$launches" -ge 3 ]; then
        echo "error: 3 launches in a row without a new checkpoint; hint: the messages above" >&2
        exit 1
    fi
    sleep 10
done

python hellaswag.py --model "$run" --out "$run/hellaswag.json"
python generate.py --model "$run" --prompt "Hello, I'm a language model," --n 4
if [ ! -e "$run/hugging-face" ]; then
    python hf.py export "$run" "$run/hugging-face"
fi
