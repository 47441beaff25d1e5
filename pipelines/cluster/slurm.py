#!/usr/bin/env python3
"""A run on SLURM: CPU jobs find tissue and lay grids, GPU jobs extract.

    pip install dask-jobqueue
    python pipelines/cluster/slurm.py --cpu-jobs 8 --gpu-jobs 2 -- archive/ -o /shared/job -e uni

Everything after -- goes to ``wsi-pipe run``. The job directory and the slides must be on disks that all nodes see, and
wsi-pipe installed where the jobs run. The run itself needs little; it may sit on the login node in tmux, and
interrupted it goes on when it is started again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from dask_jobqueue import SLURMCluster


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-jobs", type=int, default=8)
    parser.add_argument("--gpu-jobs", type=int, default=0)
    parser.add_argument("--cpu-partition", default="cpu")
    parser.add_argument("--gpu-partition", default="gpu")
    parser.add_argument("--memory", default="16GB")
    parser.add_argument("--walltime", default="24:00:00")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="after --: arguments of wsi-pipe run")
    options = parser.parse_args()
    rest = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    # One process and one thread a job: a worker keeps one encoder, and reads with threads of its own.
    common = {"cores": 4, "processes": 1, "memory": options.memory, "walltime": options.walltime}
    with SLURMCluster(queue=options.cpu_partition, worker_extra_args=["--nthreads", "1"], **common) as cluster:
        cluster.scale(jobs=options.cpu_jobs)
        command = [sys.executable, "-m", "wsi_pipe", "run", *rest, "--scheduler", cluster.scheduler_address]
        if not options.gpu_jobs:
            return subprocess.run(command, check=False).returncode
        # GPU jobs join the same scheduler and say so by a resource, which extraction then asks for.
        script = (
            f"#!/bin/sh\n#SBATCH -p {options.gpu_partition}\n#SBATCH --gres=gpu:1\n#SBATCH -c 8\n"
            f"#SBATCH --mem={options.memory.removesuffix('B')}\n#SBATCH -t {options.walltime}\n"
            f"exec dask worker {cluster.scheduler_address} --nthreads 1 --resources GPU=1 --no-dashboard"
            " --death-timeout 300\n"
        )
        jobs = []
        try:
            for _ in range(options.gpu_jobs):
                done = subprocess.run(
                    ["sbatch", "--parsable"], input=script, text=True, check=True, capture_output=True
                )
                jobs.append(done.stdout.strip().split(";")[0])
            return subprocess.run([*command, "--resources", "GPU=1"], check=False).returncode
        finally:
            # Jobs that wait in the queue, or for a scheduler that is gone, would hold GPUs until their time is up.
            if jobs:
                subprocess.run(["scancel", *jobs], check=False)


if __name__ == "__main__":
    sys.exit(main())
