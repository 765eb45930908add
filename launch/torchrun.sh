#!/usr/bin/env bash
# Start a training with torchrun on this node: one of one, or one of many that run the same line.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: [NNODES=N NODE_RANK=K MASTER_ADDR=HOST] launch/torchrun.sh RUN.yaml [key=value ...]

Runs `megatrain train RUN.yaml ...` with one rank a GPU (one rank on a node without).

  one node       launch/torchrun.sh configs/run/tiny.yaml
  two nodes      on n0:  NNODES=2 NODE_RANK=0 MASTER_ADDR=n0 launch/torchrun.sh RUN.yaml
                 on n1:  NNODES=2 NODE_RANK=1 MASTER_ADDR=n0 launch/torchrun.sh RUN.yaml

Environment:
  NNODES         nodes of the job (1)
  NODE_RANK      this node's number, from 0; MASTER_ADDR names node 0
  MASTER_ADDR    host of node 0, as the others reach it; needed with several nodes
  MASTER_PORT    a free port there (29500); one node alone picks its own
  NPROC          ranks on this node (number of GPUs)
  PYTHON         interpreter (.venv/bin/python beside this script's folder, else python3)
  IFNAME         network interface of torch and NCCL for TCP, such as eth0 or ib0 (their own choice)
  IB_HCA         InfiniBand adapters of NCCL, such as mlx5_0,mlx5_1 (its own choice)
  NO_IB=1        use TCP although there is InfiniBand
  SAVE_SECONDS   how long torchrun lets ranks save after Ctrl-C or SIGTERM before it kills them (600)
  DRY_RUN=1      print the command and what is exported, and start nothing

NCCL_* variables that are set already are kept. torchrun ends with 0 or 1: a run that was stopped and saved ends with 1
as well (its events.jsonl says preempted). On one node `megatrain train RUN.yaml --nproc N` keeps the exit code 75.
TEXT
}

die() {
    echo "launch/torchrun.sh: $*" >&2
    exit 2
}

# need_number NAME VALUE LEAST MOST: VALUE, or a sentence that refuses it.
need_number() {
    if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
        die "$1=$2 is not a whole number from $3 to $4"
    fi
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
"") die "no run file: give RUN.yaml (see --help)" ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $here/.venv/bin/python ]] && PYTHON=$here/.venv/bin/python
fi

# --- who takes part --------------------------------------------------------------------------------------------------

nnodes=${NNODES:-1}
need_number NNODES "$nnodes" 1 100000
need_number NODE_RANK "${NODE_RANK:-0}" 0 $((nnodes - 1))
need_number MASTER_PORT "${MASTER_PORT:-29500}" 1 65535
if ((nnodes > 1)); then
    [[ -n ${NODE_RANK:-} ]] || die "NODE_RANK is not set: give this node's number, from 0 to $((nnodes - 1))"
    [[ -n ${MASTER_ADDR:-} ]] || die "MASTER_ADDR is not set: give the host name of node 0"
    case "$MASTER_ADDR" in
    localhost | 127.* | ::1) die "MASTER_ADDR=$MASTER_ADDR cannot be reached from other nodes: give node 0's name" ;;
    esac
fi

gpus=0
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    gpus=$(awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES")
elif command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
need_number NPROC "$nproc" 1 1024

# --- the network: only files of this folder set such variables -------------------------------------------------------

export_default() { # export_default NAME VALUE: what is set already is kept
    [[ -n ${!1:-} ]] || export "$1=$2"
}

if [[ -n ${IFNAME:-} ]]; then
    export_default NCCL_SOCKET_IFNAME "$IFNAME"
    export_default GLOO_SOCKET_IFNAME "$IFNAME"
fi
if [[ -n ${NO_IB:-} ]]; then
    export_default NCCL_IB_DISABLE 1
elif compgen -G '/sys/class/infiniband/*' >/dev/null; then
    [[ -z ${IB_HCA:-} ]] || export_default NCCL_IB_HCA "$IB_HCA"
    # A link that flaps for seconds should delay a step and not end the run: 4.096 us * 2^22 = 17 s a try, 7 tries.
    export_default NCCL_IB_TIMEOUT 22
    export_default NCCL_IB_RETRY_CNT 7
fi
export_default TORCH_ELASTIC_SHUTDOWN_TIMEOUT "${SAVE_SECONDS:-600}"

# --- start -----------------------------------------------------------------------------------------------------------

command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$nproc" --max-restarts 0)
if ((nnodes > 1)); then
    command+=(--nnodes "$nnodes" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    command+=(--standalone)
fi
command+=(-m megatrain train "$@")

if [[ -n ${DRY_RUN:-} ]]; then
    for name in NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_DISABLE NCCL_IB_HCA NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT \
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT; do
        [[ -z ${!name:-} ]] || echo "$name=${!name}"
    done
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
