#!/usr/bin/env bash
# Linear probe of every layer of a run, on one GPU:
#   DATA=/data/cifar10 RUN=runs/l sbatch slurm/probe.sh
# Variables: DATA (labelled; without it the run's own first source), RUN, VENV [.venv]. Arguments go to `igpt-ds probe`.
#SBATCH --job-name=igpt-probe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=igpt-probe-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
: "${RUN:?set RUN to the run directory}"
export PATH=${VENV:-.venv}/bin:$PATH

data=()
[[ -z ${DATA:-} ]] || data=(--data "$DATA")
python -m igpt_ds probe "$RUN" "${data[@]}" "$@"
