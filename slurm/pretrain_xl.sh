#!/usr/bin/env bash
# Pre-train iGPT-XL: 8 nodes of 8 GPUs. Every number can be overridden from the sbatch line:
#   DATA=/data/imagenet64 RUN=runs/xl sbatch slurm/pretrain_xl.sh
#   DATA=... RUN=... PRESET=l sbatch --nodes=2 slurm/pretrain_xl.sh --set training.micro_batch=4
# Variables: DATA (one folder, or several divided by colons), RUN, PRESET [xl], DS_CONFIG [as RUN began, else auto], and those of env.sh:
# VENV [.venv], MAX_RESTARTS [3]. Arguments go to `igpt-ds pretrain`. The job saves and requeues itself ten minutes
# before its time is up (a --time below half an hour wants a shorter --signal, too), when it is preempted, and after a
# crash, but not when it is cancelled; see docs/reliability.md.
#SBATCH --job-name=igpt-xl
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=igpt-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
: "${DATA:?set DATA to the folder that igpt-data shards wrote}" "${RUN:?set RUN to the run directory}"
# shellcheck source=slurm/env.sh
source slurm/env.sh

mapfile -t data < <(data_options)
run_ranks python -m igpt_ds pretrain "$RUN" --preset "${PRESET:-xl}" "${machine[@]}" "${data[@]}" "$@"
