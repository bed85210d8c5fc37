#!/usr/bin/env bash
# Token shards from images: an array of jobs builds them, and a job after it writes the manifests. This script only
# submits them, so that it can be run on a login node (bash) or as a small job (sbatch). Run it again to submit what
# is missing; it does nothing while the jobs of an earlier call are waiting or running.
#   SOURCE=imagenet IMAGES=/data/ILSVRC2012 PALETTE=palette.npy OUT=/data/imagenet64 \
#     PARTITION=cpu bash slurm/build_shards.sh --resolution 64 --views 3
#   SOURCE=img2dataset IMAGES=/data/web PALETTE=palette.npy OUT=/data/web64 CPUS=16 PARALLEL=64 \
#     sbatch slurm/build_shards.sh --resolution 64 --holdout 0 --no-augment --max-reject-rate 0.01 --wait
# Variables: SOURCE, IMAGES (one path or URL, or several divided by spaces), PALETTE, OUT (where all nodes see it),
#   PARTITION and ACCOUNT [the site's own], TIME [12:00:00] and CPUS [8] of a job, MEM [2G] of a CPU,
#   PARALLEL [256] jobs at a time, VENV [.venv]. Arguments go to `igpt-data shards`.
#SBATCH --job-name=igpt-shards
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=24:00:00
#SBATCH --output=igpt-shards-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
: "${SOURCE:?set SOURCE to imagenet, img2dataset or another source}" "${IMAGES:?set IMAGES to the images}"
: "${PALETTE:?set PALETTE to the file that igpt-data palette wrote}" "${OUT:?set OUT to the folder of the dataset}"
export PATH=${VENV:-.venv}/bin:$PATH
# What this job was given must not reach the jobs that it submits.
for name in "${!SLURM_@}" "${!SBATCH_@}"; do
  [[ $name == SLURM_CONF || $name == SLURM_CLUSTERS ]] || unset "$name"
done

read -r -a images <<<"$IMAGES"
options=(--executor slurm --workers "${CPUS:-8}" --array-parallelism "${PARALLEL:-256}")
options+=(--slurm-time "${TIME:-12:00:00}" --slurm-option "mem-per-cpu=${MEM:-2G}")
[[ -z ${PARTITION:-} ]] || options+=(--slurm-partition "$PARTITION")
[[ -z ${ACCOUNT:-} ]] || options+=(--slurm-account "$ACCOUNT")

python -m data_prep shards "$SOURCE" "${images[@]}" --palette "$PALETTE" --out "$OUT" "${options[@]}" "$@"
