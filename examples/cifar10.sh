#!/usr/bin/env bash
# The paper's experiments in miniature, on CIFAR-10: what docs/cifar10.md reports. Hours on two cores; resumable.
#   examples/cifar10.sh CIFAR10 OUT [PART...]
# CIFAR10 is what you have of it: the hub's Parquet files (a folder, or hf://datasets/uoft-cs/cifar10), the archive for
# Python or binary (packed or not), or train/ and test/ with a folder a class. Nothing is downloaded.
# PART: data sweep pretrain probe finetune samples figures; without any, all in this order. The same command goes on where
# it was stopped. Variables:
#   SIDE=32      pixels a side                                              [16]
#   NETWORKS     NAME:LAYERS:WIDTH:HEADS of each, in order of size          [small:4:64:4 medium:6:96:4 large:8:128:4]
#   SUBJECT=NAME of them, which BERT and the fine-tunings are compared on   [the smallest]
#   STEPS=30000  of pre-training, 64 images each                            [3000]
#   SEEDS="0 1"  of fine-tunings, whose differences are claims              [0 1 2]
#   COMPILE=true compiled blocks, a sixth faster on a CPU with a compiler   [false]
#   LAUNCH       what starts igpt-ds on GPUs, for instance
#                "deepspeed --num_accelerators 8 --module igpt_ds"          [python -m igpt_ds]
#   SHORT=1      20 steps in place of 3000: does every part run here? Minutes, with a CIFAR10 of some 500 images.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }
cifar=$1 out=$2
shift 2
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(data sweep pretrain probe finetune samples figures)
here=$(cd "$(dirname "$0")" && pwd)
side=${SIDE:-16} short=${SHORT:-}
steps=${STEPS:-3000}
read -ra seeds <<<"${SEEDS:-0 1 2}"
read -ra networks <<<"${NETWORKS:-small:4:64:4 medium:6:96:4 large:8:128:4}"
read -ra launch <<<"${LAUNCH:-python -m igpt_ds}"
rates=0.03,0.01,0.003,0.001 tuning_rates=0.003,0.001,0.0003,0.0001
few=(4 40 400) few_steps=300 all_steps=1400 some=(--images 10000)
if [ -n "$short" ]; then
  steps=20 few=(4) few_steps=20 all_steps=20 rates=0.01 tuning_rates=0.001
  some=(--images 50)
fi
every=$((steps / 12))
probed=("$every" $((2 * every)) $((4 * every)) $((8 * every)) "$steps")
[ -z "$short" ] || every=10 probed=(10 20)
subject=${networks[0]}
for each in "${networks[@]}"; do [ "${each%%:*}" != "${SUBJECT:-}" ] || subject=$each; done
igpt-data() { python -m data_prep "$@"; }
igpt-ds() { python -m igpt_ds "$@"; }
mkdir -p "$out"

# Run a command unless the file that it writes last is there.
once() {
  local made=$1
  shift
  [ -e "$made" ] || "$@"
}

# A network's options: NAME:LAYERS:WIDTH:HEADS OBJECTIVE
network() {
  local name layers width heads
  IFS=: read -r name layers width heads <<<"$1"
  echo --preset "$here/cifar10.toml" --data "$out/data" --set "model.layers=$layers" --set "model.width=$width" \
    --set "model.heads=$heads" --set "objective.name=$2" --set "training.steps=$steps" --set "training.batch=64" \
    --set "training.warmup_steps=$((steps / 30 + 1))" --set "training.validate_every=$every" \
    --set "training.sample_every=$((steps / 3 + 1))" --set "training.compile=${COMPILE:-auto}" \
    --set "checkpoint.every=$every" --set "checkpoint.milestones=[$(IFS=,; echo "${probed[*]}")]"
}

# The rate that a sweep has found.
best_rate() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))["winner"])' "$1/sweep.json"; }

data() {
  local reader=(parquet "$cifar")
  case $cifar in
    hf://* | *.parquet) ;;
    *)
      if [ -z "$(find -L "$cifar" -maxdepth 3 -name '*.parquet' -print -quit)" ]; then
        reader=(image_folder "$cifar")
        if [ -f "$cifar" ] || [ -n "$(find -L "$cifar" -maxdepth 2 -name 'cifar-10-*' -print -quit)" ] ||
          [ -n "$(find -L "$cifar" -maxdepth 1 -name 'data_batch_1*' -print -quit)" ]; then
          reader=(cifar10 "$cifar")
        fi
      fi
      ;;
  esac
  local colours
  for colours in 256 512 1024; do
    once "$out/palette-$colours.npy" igpt-data palette "${reader[@]}" --k "$colours" --no-crop --resolution "$side" \
      --workers 2 --out "$out/palette-$colours.npy" | tee -a "$out/palettes.txt"
  done
  igpt-data shards "${reader[@]}" --palette "$out/palette-512.npy" --no-crop --resolution "$side" --holdout 0.1 \
    --split train --split val --split test --workers 2 --out "$out/data"
}

# Of the smallest network, each objective; the others take its rates. The first tenth of the schedule.
sweep() {
  local objective
  for objective in next_pixel masked_pixel; do
    # shellcheck disable=SC2046 # the options are words
    once "$out/sweep-$objective/sweep.json" igpt-ds sweep --out "$out/sweep-$objective" --share 0.1 --rates "$rates" -- \
      pretrain $(network "${networks[0]}" "$objective") --set training.sample_every=0
  done
}

pretrain() {
  local each
  for each in "${networks[@]}"; do
    # shellcheck disable=SC2046
    "${launch[@]}" pretrain "$out/${each%%:*}" $(network "$each" next_pixel) \
      --set "training.learning_rate=$(best_rate "$out/sweep-next_pixel")"
  done
  # shellcheck disable=SC2046
  "${launch[@]}" pretrain "$out/bert" $(network "$subject" masked_pixel) \
    --set "training.learning_rate=$(best_rate "$out/sweep-masked_pixel")"
}

# Every layer, by its depth; of the auto-regressive runs at every milestone, too, with fewer labels.
probe() {
  local each step run
  for each in "${networks[@]}" bert; do
    run=$out/${each%%:*}
    once "$run/probe.json" igpt-ds probe "$run" --untrained --concatenate 3 --split test
    once "$run/low_data.json" igpt-ds low-data "$run" --labels "$(IFS=,; echo "${few[*]}")" --split test
    once "$run/eval.json" igpt-ds eval "$run" --split test
  done
  for each in "${networks[@]}"; do
    run=$out/${each%%:*}
    for step in "${probed[@]}"; do
      once "$run/probe-$step.json" igpt-ds probe "$run" --step "$step" "${some[@]}"
    done
  done
}

# One fine-tuning: RUN KIND LABELS OPTIONS...; KIND: tuned, scratch or bert; LABELS a class, 0 for all.
tune() {
  local run=$1 kind=$2 labels=$3 from=(--from "$out/${subject%%:*}") length=$few_steps
  shift 3
  [ "$kind" != bert ] || from=(--from "$out/bert")
  [ "$kind" != scratch ] || from+=(--from-scratch)
  if [ "$labels" = 0 ]; then length=$all_steps; else from+=(--set "finetune.labels=$labels"); fi
  echo finetune ${run:+"$run"} "${from[@]}" --data "$out/data" --set "training.steps=$length" \
    --set "training.validate_every=$((length / 4))" --set "training.batch=64" --set finetune.augmentation=crop_flip \
    --set finetune.patience=0 --set "training.compile=${COMPILE:-auto}" "$@"
}

# From the pre-trained network, from random weights (classification alone), and from BERT. Rates by the middle number of
# labels on val/; test/ is read once, at the end of each run.
finetune() {
  local kind labels seed run
  for kind in tuned scratch bert; do
    # shellcheck disable=SC2046
    once "$out/sweep-$kind/sweep.json" igpt-ds sweep --out "$out/sweep-$kind" --rates "$tuning_rates" -- \
      $(tune "" "$kind" "${few[$((${#few[@]} / 2))]}")
    for labels in "${few[@]}" 0; do
      for seed in "${seeds[@]}"; do
        run=$out/$kind-$labels-$seed
        # shellcheck disable=SC2046
        once "$run/result.json" "${launch[@]}" $(tune "$run" "$kind" "$labels" --split test --set "seed=$seed" \
          --set "training.learning_rate=$(best_rate "$out/sweep-$kind")")
      done
    done
  done
}

samples() {
  local each run
  for each in "${networks[@]}"; do
    run=$out/${each%%:*}
    igpt-ds sample "$run" --images 64 --out "$run/samples.png"
    igpt-ds sample "$run" --images 8 --complete "$out/data" --split test --out "$run/completions.png"
  done
}

# The paper's figures and tables, and what all of them were drawn from: small enough to keep.
figures() {
  local run name runs=()
  for run in "$out"/*/; do
    [ ! -e "$run/metrics.jsonl" ] || runs+=("${run%/}")
  done
  igpt-ds figures "${runs[@]}" --out "$out/paper"
  python "$here/cifar10_table.py" "$out" | tee "$out/paper/finetuning.md"
  for run in "${runs[@]}"; do
    name=$out/records/$(basename "$run")
    mkdir -p "$name"
    cp "$run"/config.toml "$run"/*.json* "$name"
  done
}

for part in "${parts[@]}"; do
  case $part in
    data | sweep | pretrain | probe | finetune | samples | figures) "$part" ;;
    *) echo "$0: no part $part: data sweep pretrain probe finetune samples figures" >&2 && exit 2 ;;
  esac
done
