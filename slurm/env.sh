# shellcheck shell=bash
# What the job scripts share; sourced from the repository's root. One srun task is one rank.
#   run_ranks COMMAND ...    start it on every rank; pass the scheduler's notice on; requeue if it saved and stopped

VENV=${VENV:-.venv}
export PATH=$VENV/bin:$PATH
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

run_ranks() {
  local step notified='' status=0
  # USR1 would kill a rank before Python listens: ignored until then, and so sent again and again below. srun does
  # not take the job's --cpus-per-task over by itself.
  # shellcheck disable=SC2016 # expanded by each task
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec "$@"' _ "$@" &
  step=$!
  trap 'notified=yes' USR1
  while kill -0 "$step" 2>/dev/null; do
    [[ -z $notified ]] || kill -USR1 "$step" 2>/dev/null || true
    # A trapped signal ends `wait` too.
    sleep 20 &
    wait -n "$step" "$!" || true
  done
  wait "$step" || status=$?
  if [[ -n $notified && $status == 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}
