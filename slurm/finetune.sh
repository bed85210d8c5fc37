#!/usr/bin/env bash
# Fine-tune a pre-trained model to classify, on one node of 8 GPUs:
#   DATA=/data/cifar10 FROM=runs/l RUN=runs/l-cifar10 sbatch slurm/finetune.sh --set finetune.augmentation=crop_flip --split test
#   DATA=/data/imagenet48 FROM=runs/l48 RUN=runs/l48-scratch sbatch slurm/finetune.sh --from-scratch
# Variables: DATA (labelled train/ and val/), FROM (a run or a checkpoint), RUN, DS_CONFIG [as RUN began, else auto], and those of env.sh:
# VENV [.venv], MAX_RESTARTS [3]. Arguments go to `igpt-ds finetune`. Saves and requeues itself as pretrain_xl.sh does.
#SBATCH --job-name=igpt-finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=igpt-finetune-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
: "${DATA:?set DATA to the folder that igpt-data shards wrote}" "${FROM:?set FROM to the run directory of the pre-training}"
: "${RUN:?set RUN to the run directory}"
# shellcheck source=slurm/env.sh
source slurm/env.sh

run_ranks python -m igpt_ds finetune "$RUN" --from "$FROM" "${machine[@]}" --data "$DATA" "$@"
