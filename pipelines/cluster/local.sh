#!/usr/bin/env bash
# A scheduler and workers on this machine, and a run on them: what a cluster does, on one computer.
#   pipelines/cluster/local.sh archive/ job 4        (PORT, 8786 where not set, is the scheduler's)
# Scheduler and workers listen on the loopback interface only: Dask runs what it is sent. Other users of the machine reach
# that too; where you do not trust them, use TLS as docs/scaling.md says.
set -euo pipefail
slides=$1 job=$2 workers=${3:-2} port=${PORT:-8786}
dask scheduler --host 127.0.0.1 --port "$port" --no-dashboard &
processes=($!)
trap 'kill "${processes[@]}" 2>/dev/null || true' EXIT
for _ in $(seq "$workers"); do
    # One thread a worker: a worker is a process with one encoder, and its slide's tiles are read by threads of its own.
    dask worker "tcp://127.0.0.1:$port" --host 127.0.0.1 --nthreads 1 --no-dashboard &
    processes+=($!)
done
wsi-pipe run "$slides" -o "$job" --scheduler "tcp://127.0.0.1:$port" --timeout 3600
