#!/bin/bash
# One command as ranks on several nodes, without Slurm. Start it on every node, the same but for --node-rank:
#
#   torchrun_multinode.sh --nnodes=2 --nproc-per-node=8 --node-rank=0 --master-addr=node0 srlm stage RUN M1
#   torchrun_multinode.sh --nnodes=2 --nproc-per-node=8 --node-rank=1 --master-addr=node0 srlm stage RUN M1
#
# Options are written --name=value. --master-addr: the first node's name or address, as all nodes reach it; --master-port:
# a free port there (29400); --rendezvous=c10d: nodes choose the first one themselves; --threads: OMP_NUM_THREADS (1).
# All nodes must see RUN. To stop with a checkpoint: touch RUN/stop.
# `srlm run` prints these lines when a stage needs them.
set -euo pipefail

fail() {
  echo "torchrun_multinode.sh: $*" >&2
  exit 2
}

# An option, its value and the least and largest that it may be.
whole() {
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,4})$ ]] || (($2 < $3 || $2 > $4)); then
    fail "$1=$2: give a whole number from $3 to $4"
  fi
}

nnodes='' nproc='' node_rank='' addr='' port=29400 rendezvous=static threads=1
while (($#)); do
  case $1 in
    --nnodes=*) nnodes=${1#*=} ;;
    --nproc-per-node=*) nproc=${1#*=} ;;
    --node-rank=*) node_rank=${1#*=} ;;
    --master-addr=*) addr=${1#*=} ;;
    --master-port=*) port=${1#*=} ;;
    --rendezvous=*) rendezvous=${1#*=} ;;
    --threads=*) threads=${1#*=} ;;
    -*) fail "unknown option $1; options are written --name=value, see the lines at the top of $0" ;;
    *) break ;;
  esac
  shift
done
[[ -n $nnodes && -n $nproc && -n $node_rank && -n $addr ]] ||
  fail "give --nnodes=N --nproc-per-node=P --node-rank=R --master-addr=HOST and a command"
whole --nnodes "$nnodes" 1 99999
whole --nproc-per-node "$nproc" 1 99999
whole --node-rank "$node_rank" 0 99999
whole --master-port "$port" 1 65535
whole --threads "$threads" 1 99999
(($#)) || fail "give a command, for example srlm stage RUN M1"
((node_rank < nnodes)) || fail "--node-rank=$node_rank: of --nnodes=$nnodes the last one is $((nnodes - 1))"
getent hosts "$addr" >/dev/null ||
  fail "the host name $addr does not resolve on $(hostname): every node needs its address, in DNS or in /etc/hosts"
command -v "$1" >/dev/null || fail "$1: no such command on $(hostname)"

case $rendezvous in
  static) place=(--master-addr="$addr" --master-port="$port") ;;
  c10d) place=(--rdzv-backend=c10d --rdzv-endpoint="$addr:$port" --rdzv-id=srlm) ;;
  *) fail "--rendezvous=$rendezvous: static or c10d" ;;
esac

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export OMP_NUM_THREADS=$threads
export SRLM_PARENT_PID=$$ # of another torchrun too, after exec: its ranks end with it
if [[ -n ${TORCHRUN:-} ]]; then agent=("$TORCHRUN"); else agent=("$(dirname "$(command -v "$1")")/srlm" torchrun); fi
# No restarts: workers may reconnect to addresses from before the restart. The same lines resume from the checkpoint.
exec "${agent[@]}" --node-rank="$node_rank" --nnodes="$nnodes" \
  --nproc-per-node="$nproc" "${place[@]}" --max-restarts=0 --no-python "$@"
