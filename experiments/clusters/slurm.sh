#!/bin/bash
# A run on nodes of Slurm: starts Ray on them and `fedpost run` in it. Submit it from a folder that all nodes see, with
# fedpost installed in its .venv:
#
#   sbatch --nodes=3 --gpus-per-node=2 experiments/clusters/slurm.sh RECIPE [--set a.b=c ...] [--out DIR] [--resume]
#
#SBATCH --job-name=fedpost
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
# Two minutes before the time is up, Slurm signals this script, which ends the run; --resume continues it.
#SBATCH --signal=B:TERM@120
set -euo pipefail

source .venv/bin/activate
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
others=$((${#nodes[@]} - 1))
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
ip=$("${on_head[@]}" hostname --ip-address | cut -d ' ' -f 1)
port=${RAY_PORT:-6379}
address=$ip:$port

# Anyone who reaches the nodes' ports needs this token.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

"${on_head[@]}" ray start --head --node-ip-address="$ip" --port="$port" --include-dashboard=false --block &
head=$!
until timeout 30 ray health-check --address "$address" 2> /dev/null; do
  if ! kill -0 $head 2> /dev/null || ((SECONDS > 300)); then
    echo "error: ray start on ${nodes[0]} has ended, or not answered at $address within five minutes: see above" >&2
    exit 1
  fi
  sleep 1
done
if ((others > 0)); then
  srun --overlap --nodes=$others --ntasks=$others --exclude="${nodes[0]}" ray start --address="$address" --block &
fi
# Slots are placed on the nodes that exist when the run begins.
timeout 300 python - "$address" "${#nodes[@]}" << 'END'
import sys, time, ray

ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(1)
END

# In the background, since a shell receives the signal while it waits, but not while it runs a command.
fedpost run "$@" --address "$address" &
run=$! code=0
trap 'kill -TERM $run' TERM
wait $run || code=$?
wait $run || code=$? # if the signal ended the first wait
exit $code
