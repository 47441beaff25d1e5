#!/usr/bin/env bash
# An archive in shards, as an array job: each task is a run of its own, and needs neither Dask nor the others.
#   sbatch --array=1-16 deploy/slurm-array.sh archive/ out -e uni        (or with IMAGE=wsi-pipe.sif set, in a container)
# Then make one job of them: docs/scaling.md, Shards. A task that was ended goes on with: sbatch --array=3 ... as before.
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
slides=$1 out=$2
shift 2
shard=$SLURM_ARRAY_TASK_ID count=${SLURM_ARRAY_TASK_MAX:?}
# A part of an array (--array=3) is still the third of all: say of how many.
count=${SHARDS:-$count}
command=(wsi-pipe)
if [ -n "${IMAGE:-}" ]; then command=(apptainer exec --nv "$IMAGE" wsi-pipe); fi
# exec: the signal above reaches the run itself, which keeps what is half done.
exec "${command[@]}" run "$slides" -o "$out/shards/$shard" --shard "$shard/$count" "$@"
