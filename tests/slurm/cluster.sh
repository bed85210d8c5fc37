#!/usr/bin/env bash
# A real Slurm on one machine, for the tests: a controller and a few simulated nodes, without systemd or munge.
#   CLUSTER=DIR cluster.sh up             start it afresh, below DIR; its clients need SLURM_CONF=DIR/slurm.conf
#   CLUSTER=DIR cluster.sh kill_node N    what a power cut does to node N: its daemon and all jobs' processes are gone
#   CLUSTER=DIR cluster.sh start_node N   switch it on (nothing if it runs)
#   CLUSTER=DIR cluster.sh down           end it (nothing if it is not there); logs stay in DIR/log
# Each node has a process, mount and host name space of its own, so that killing the first process there kills the
# node; and a host name, which leads to 127.0.0.1 only where DIR/hosts is /etc/hosts: in the nodes. GPUs are copies of
# /dev/null. Partition `main` is what runs jobs; jobs of `urgent` preempt them; `wide` is 8 nodes of 8 GPUs that are
# never switched on: for `sbatch --test-only`. Needs root and Debian's slurm-wlm.
# Variables: NODES [3], OWNER (a process: the cluster ends when it is gone, however it went).
set -euo pipefail
: "${CLUSTER:?set CLUSTER to a directory of its own}"
NODES=${NODES:-3}
export SLURM_CONF=$CLUSTER/slurm.conf

configure() {
  local port=$1 n
  cat <<END
ClusterName=test
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog=$CLUSTER/task_prolog
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$CLUSTER/state
SlurmctldPidFile=$CLUSTER/run/controller.pid
SlurmctldLogFile=$CLUSTER/log/controller.log
SlurmdSpoolDir=$CLUSTER/spool/%n
SlurmdPidFile=$CLUSTER/run/slurmd-%n.pid
SlurmdLogFile=$CLUSTER/log/%n.log
# MASTER_PORT is made of the job's id: several clusters may run on this machine.
FirstJobId=$((1 + SRANDOM % 60000000))
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
# A requeued job waits until its old credentials have expired: 5 s is the least that is taken, 120 the default.
AuthInfo=cred_expire=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=2
MessageTimeout=10
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
END
  for ((n = 1; n <= NODES; n++)); do
    echo "NodeName=node$n NodeAddr=127.0.0.1 Port=$((port + n)) CPUs=8 CoresPerSocket=8 RealMemory=16000 Gres=gpu:8"
  done
  echo "NodeName=wide[1-8] CPUs=64 CoresPerSocket=64 RealMemory=500000 Gres=gpu:8 State=CLOUD"
  echo "PartitionName=main Nodes=node[1-$NODES] Default=YES PriorityTier=1 GraceTime=60"
  echo "PartitionName=urgent Nodes=node[1-$NODES] PriorityTier=2 PreemptMode=OFF"
  echo "PartitionName=wide Nodes=wide[1-8]"
}

free_ports() { # the first of 1 + NODES ports on which nobody listens
  local port n
  while :; do
    port=$((30000 + SRANDOM % 2000))
    for ((n = 0; n <= NODES; n++)); do
      ! (: <"/dev/tcp/127.0.0.1/$((port + n))") 2>/dev/null || continue 2
    done
    echo "$port"
    return
  done
}

start() { # NAME COMMAND...: in name spaces of its own; DIR/run/NAME.pid is the process that holds them
  local name=$1
  shift
  # The shell is the first process there, and takes in those whose parents have ended.
  # shellcheck disable=SC2016 # expanded by that shell
  setsid unshare --uts --mount --pid --fork --mount-proc --kill-child bash -c '
    hostname "$1"; mount --bind "$2" /etc/hosts; "${@:3}"; exit' _ "$name" "$CLUSTER/hosts" "$@" \
    >>"$CLUSTER/log/$name.out" 2>&1 </dev/null &
  echo "$! $(born "$!")" >"$CLUSTER/run/$name"
}

born() { # when a process started: tells it from a later one of the same id
  local stat
  read -r stat 2>/dev/null <"/proc/$1/stat" || return 0
  cut -d ' ' -f 20 <<<"${stat##*) }"
}

running() { # NAME: its process, if that is still there and no zombie
  local pid since
  read -r pid since 2>/dev/null <"$CLUSTER/run/$1" && [[ -n $since && $(born "$pid") == "$since" ]] &&
    ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null && echo "$pid"
}

stop() { # NAME
  local pid first i
  pid=$(running "$1") || return 0
  # The first process in there ends when all others have been killed, and its parent, the one of the file, after it.
  read -r first _ <"/proc/$pid/task/$pid/children" || true # there is no end of line
  kill -KILL "${first:-$pid}"
  for ((i = 0; i < 100; i++)); do
    running "$1" >/dev/null || return 0
    sleep 0.05
  done
  echo "$0: process $pid of $1 survives" >&2
  return 1
}

start_node() {
  running "node$1" >/dev/null || start "node$1" slurmd -D -N "node$1"
}

down() {
  local n
  for ((n = 1; n <= NODES; n++)); do stop "node$n"; done
  stop controller
}

up() {
  local n
  down
  rm -rf "$CLUSTER"
  mkdir -p "$CLUSTER"/{state,run,log,dev,spool}
  echo "127.0.0.1 localhost controller" >"$CLUSTER/hosts"
  configure "$(free_ports)" >"$SLURM_CONF"
  # The fake GPUs' numbers would be those of real ones, where there are any.
  printf '#!/bin/sh\necho export CUDA_VISIBLE_DEVICES=\n' >"$CLUSTER/task_prolog"
  chmod +x "$CLUSTER/task_prolog"
  for n in {0..7}; do mknod "$CLUSTER/dev/nvidia$n" c 1 3; done
  for ((n = 1; n <= NODES; n++)); do
    echo "127.0.0.1 node$n" >>"$CLUSTER/hosts"
    echo "NodeName=node$n Name=gpu File=$CLUSTER/dev/nvidia[0-7]" >>"$CLUSTER/gres.conf"
  done
  echo "NodeName=wide[1-8] Name=gpu File=$CLUSTER/dev/nvidia[0-7]" >>"$CLUSTER/gres.conf"
  if [[ -n ${OWNER:-} ]]; then
    # shellcheck disable=SC2016 # expanded by that shell
    setsid bash -c 'while kill -0 "$1"; do sleep 1; done; "$2" down' _ "$OWNER" "$(realpath "$0")" \
      >/dev/null 2>&1 </dev/null &
  fi
  start controller slurmctld -D
  for ((n = 1; n <= NODES; n++)); do start_node "$n"; done
  for ((n = 0; n < 150; n++)); do
    [[ $(timeout 10 sinfo -h -p main -N -t idle -o %N 2>/dev/null | wc -l) != "$NODES" ]] || return 0
    sleep 0.2
  done
  tail -n 20 "$CLUSTER"/log/* >&2
  down
  return 1
}

case ${1:-} in
  up | down) "$1" ;;
  start_node | kill_node) if [[ $1 == start_node ]]; then start_node "$2"; else stop "node$2"; fi ;;
  *) echo "usage: CLUSTER=DIR $0 up|down|start_node N|kill_node N" >&2; exit 2 ;;
esac
