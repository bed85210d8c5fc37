# shellcheck shell=bash
# What the job scripts share; sourced from the repository's root. One srun task is one rank. It may see all GPUs of its
# node, as --gpus-per-node leaves it, or its own alone (--gpus-per-task=1, --gpu-bind=single).
#   data_options              --data once for each folder in DATA
#   machine                   --ds where DS_CONFIG is set
#   run_ranks COMMAND ...     start it on every rank; pass the scheduler's notice on; then, by what became of it:
#       it saved and stopped on request     the job is requeued, unless it was cancelled
#       it was refused (bad input)          the job ends: another try would not cure it
#       it crashed                          the job is requeued, at most MAX_RESTARTS times without a new checkpoint

VENV=${VENV:-.venv}
export PATH=$VENV/bin:$PATH
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Bash's arithmetic runs commands that stand in what it takes for numbers: only digits get there.
for name in SLURM_JOB_ID SLURM_ARRAY_TASK_ID MAX_RESTARTS; do
  [[ ${!name:-3} =~ ^[0-9]{1,10}$ ]] || { echo "$name is '${!name}': set it to a whole number" >&2 && exit 2; }
done
MASTER_PORT=$((20000 + 10#$SLURM_JOB_ID % 10000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
machine=()
# shellcheck disable=SC2034 # for the scripts that source this
[[ -z ${DS_CONFIG:-} ]] || machine=(--ds "$DS_CONFIG")
# From here on a notice does not kill this shell; run_ranks passes it on.
notified=''
trap 'notified=yes' USR1 TERM

data_options() {
  local folder
  IFS=: read -r -a folders <<<"$DATA"
  for folder in "${folders[@]}"; do printf -- '--data\n%s\n' "$folder"; done
}

run_ranks() {
  local step began status=0 outcome=''
  mkdir -p "$RUN"
  # Exit statuses do not survive srun once it kills the other ranks; a word in a file does.
  export IGPT_OUTCOME=$RUN/.outcome-$SLURM_JOB_ID
  rm -f "$IGPT_OUTCOME"
  [[ -n ${SLURM_RESTART_COUNT:-} ]] || rm -f "$RUN/.restarts" # submitted by a person: counted anew
  # USR1 kills a rank before it listens. Python's imports take long: it is ignored until they are done, and so sent
  # again and again below. Tasks come into being quickly: it is not sent until that is done everywhere. srun does not
  # take the job's --cpus-per-task over by itself.
  # shellcheck disable=SC2016 # expanded by each task
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec "$@"' _ "$@" &
  step=$!
  began=$SECONDS
  while kill -0 "$step" 2>/dev/null; do
    if [[ -n $notified ]] && ((SECONDS - began >= 5)); then kill -USR1 "$step" 2>/dev/null || true; fi
    # A trapped signal ends `wait` too.
    sleep 5 &
    wait -n "$step" "$!" || true
  done
  wait "$step" || status=$?
  [[ ! -f $IGPT_OUTCOME ]] || read -r outcome <"$IGPT_OUTCOME" || true
  rm -f "$IGPT_OUTCOME"
  if [[ $outcome == requeue ]]; then
    requeue
  elif [[ $outcome != refused && $status != 0 ]]; then
    restart_after_crash
  fi
  return "$status"
}

restart_after_crash() {
  local each newest=none last=none count=0 written
  # A person's copies beside them, or links, are no progress.
  for each in "$RUN"/checkpoints/step-*; do
    [[ ! -d $each || -L $each || ! $each =~ /step-[0-9]{8,18}$ ]] || ! later "${each##*/}" "$newest" || newest=${each##*/}
  done
  if [[ -f $RUN/.restarts ]]; then
    read -r last count <"$RUN/.restarts" || true
    if [[ ! "$last $count" =~ ^(none|step-[0-9]{8,18})' '[0-9]{1,9}$ ]]; then
      echo "$RUN/.restarts: is no checkpoint and count of restarts: counted anew" >&2
      last=none count=0
    fi
  fi
  # Going back to an older checkpoint is no progress.
  if later "$newest" "$last"; then
    last=$newest count=0
  fi
  count=$((10#$count))
  if ((count >= 10#${MAX_RESTARTS:-3})); then
    echo "gave up: $count restarts without a new checkpoint (the newest: $newest); see $RUN/log.rank*.txt"
    return
  fi
  written=$(mktemp "$RUN/.restarts.XXXXXX") # a link of that name is replaced, not followed
  echo "$last $((count + 1))" >"$written"
  mv -T "$written" "$RUN/.restarts"
  echo "crashed (the newest checkpoint: $newest): restart $((count + 1)) of ${MAX_RESTARTS:-3} without a new one"
  requeue
}

later() { # whether the first of two checkpoints is the later one; "none" is before all
  [[ $1 != none ]] && { [[ $2 == none ]] || ((10#${1#step-} > 10#${2#step-})); }
}

# A job that scancel ends sees the same signals as one that is to go on, and must not come back.
requeue() {
  local facts
  facts=$(scontrol --oneliner show job "$SLURM_JOB_ID")
  if [[ $facts == *" JobState=RUNNING "* || $facts == *" Reason=TimeLimit "* ||
    $facts != *" PreemptTime=None "* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "cancelled: not requeued"
  fi
}
