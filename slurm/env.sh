# shellcheck shell=bash
# What the job scripts share; sourced from the repository's root. One srun task is one rank.
#   data_options              --data once for each folder in DATA
#   run_ranks COMMAND ...     start it on every rank; pass the scheduler's notice on; then, by what became of it:
#       it saved and stopped on request     the job is requeued
#       it was refused (bad input)          the job ends: another try would not cure it
#       it crashed                          the job is requeued, at most MAX_RESTARTS times without a new checkpoint

VENV=${VENV:-.venv}
export PATH=$VENV/bin:$PATH
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

data_options() {
  local folder
  IFS=: read -r -a folders <<<"$DATA"
  for folder in "${folders[@]}"; do printf -- '--data\n%s\n' "$folder"; done
}

run_ranks() {
  local step notified='' status=0 outcome=''
  mkdir -p "$RUN"
  # Exit statuses do not survive srun once it kills the other ranks; a word in a file does.
  export IGPT_OUTCOME=$RUN/.outcome-$SLURM_JOB_ID
  rm -f "$IGPT_OUTCOME"
  [[ -n ${SLURM_RESTART_COUNT:-} ]] || rm -f "$RUN/.restarts" # submitted by a person: counted anew
  # USR1 would kill a rank before Python listens: ignored until then, and so sent again and again below. srun does
  # not take the job's --cpus-per-task over by itself.
  # shellcheck disable=SC2016 # expanded by each task
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec "$@"' _ "$@" &
  step=$!
  trap 'notified=yes' USR1 TERM
  while kill -0 "$step" 2>/dev/null; do
    [[ -z $notified ]] || kill -USR1 "$step" 2>/dev/null || true
    # A trapped signal ends `wait` too.
    sleep 20 &
    wait -n "$step" "$!" || true
  done
  wait "$step" || status=$?
  outcome=$(cat "$IGPT_OUTCOME" 2>/dev/null || true)
  rm -f "$IGPT_OUTCOME"
  if [[ $outcome == requeue ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  elif [[ $outcome != refused && $status != 0 ]]; then
    restart_after_crash
  fi
  return "$status"
}

restart_after_crash() {
  local newest last='' count=0
  newest=$(find "$RUN/checkpoints" -maxdepth 1 -name 'step-*' -printf '%f\n' 2>/dev/null | sort | tail -n 1)
  newest=${newest:-none}
  [[ ! -f $RUN/.restarts ]] || read -r last count <"$RUN/.restarts"
  [[ $newest == "$last" ]] || count=0
  if ((count >= ${MAX_RESTARTS:-3})); then
    echo "gave up: $count restarts without a new checkpoint (the newest: $newest); see $RUN/log.rank*.txt"
    return
  fi
  echo "$newest $((count + 1))" >"$RUN/.restarts"
  echo "crashed (the newest checkpoint: $newest): restart $((count + 1)) of ${MAX_RESTARTS:-3} without a new one"
  scontrol requeue "$SLURM_JOB_ID"
}
