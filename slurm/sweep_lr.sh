#!/usr/bin/env bash
# Train with several learning rates, a job each (the paper tries 0.01, 0.003, 0.001, ... and keeps the best):
#   DATA=/data/imagenet32 RUN=runs/sweep PRESET=s sbatch slurm/sweep_lr.sh --set training.stop_at=20000
#   FROM=runs/l DATA=/data/cifar10 RUN=sweeps/cifar10 RATES="0.003 0.001" sbatch --array=0-1 slurm/sweep_lr.sh
# Variables: RATES, DATA, RUN (each rate trains in RUN/lr-RATE), PRESET [s] or, to fine-tune, FROM (a run or weights),
# DS_CONFIG [as RUN began, else auto], and those of env.sh: VENV [.venv], MAX_RESTARTS [3]. Arguments go to `igpt-ds`.
#SBATCH --job-name=igpt-sweep
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=igpt-sweep-%A-%a.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
: "${DATA:?set DATA to the folder that igpt-data shards wrote}" "${RUN:?set RUN to the folder of the runs}"
# shellcheck source=slurm/env.sh
source slurm/env.sh

read -r -a rates <<<"${RATES:-0.01 0.003 0.001 0.0003}"
rate=${rates[SLURM_ARRAY_TASK_ID]:?the array has more tasks than RATES has rates}
RUN=$RUN/lr-$rate
mapfile -t data < <(data_options)
verb=(pretrain --preset "${PRESET:-s}")
[[ -z ${FROM:-} ]] || verb=(finetune --from "$FROM")
run_ranks python -m igpt_ds "${verb[@]}" "$RUN" "${machine[@]}" "${data[@]}" \
  --set "training.learning_rate=$rate" "$@"
