#!/usr/bin/env python3
"""A run on SLURM: CPU jobs find tissue and lay grids, GPU jobs extract.

    pip install dask-jobqueue cryptography
    python pipelines/cluster/slurm.py --cpu-jobs 8 --gpu-jobs 2 -- archive/ -o /shared/job -e uni

Dask trusts whoever reaches its port, and runs what it is sent. So all connections are TLS with a certificate made for
this run, which lies in a folder of your home that nobody else can read and goes with the run; and with ``--interface``
(``ib0``, say: the network between the nodes) scheduler and workers listen there only.

Everything after -- goes to ``wsi-pipe run``. The job directory and the slides must be on disks that all nodes see, and
wsi-pipe installed where the jobs run. The run itself needs little; it may sit on the login node in tmux, and
interrupted it goes on when it is started again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dask_jobqueue import SLURMCluster
from distributed.security import Security


def certificate(folder: Path) -> dict[str, str]:
    """A new certificate and its key in ``folder``, which only the owner may read; where they are, by Dask's names."""
    made = Security.temporary()
    places = {}
    for name, text in (("ca-file", made.tls_ca_file), ("cert", made.tls_worker_cert), ("key", made.tls_worker_key)):
        path = folder / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_text(str(text))
        places[name] = str(path)
    return places


def environment(places: dict[str, str]) -> dict[str, str]:
    """What has ``wsi-pipe run --scheduler tls://...`` show the certificate."""
    return os.environ | {
        "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true",
        "DASK_DISTRIBUTED__COMM__TLS__CA_FILE": places["ca-file"],
        "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT": places["cert"],
        "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY": places["key"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-jobs", type=int, default=8)
    parser.add_argument("--gpu-jobs", type=int, default=0)
    parser.add_argument("--cpu-partition", default="cpu")
    parser.add_argument("--gpu-partition", default="gpu")
    parser.add_argument("--memory", default="16GB")
    parser.add_argument("--walltime", default="24:00:00")
    parser.add_argument("--interface", help="network interface that scheduler and workers listen on, such as ib0")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="after --: arguments of wsi-pipe run")
    options = parser.parse_args()
    rest = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    # In the home folder, which all nodes see. mkdtemp lets nobody else in.
    with tempfile.TemporaryDirectory(prefix=".wsi-pipe-tls-", dir=Path.home()) as folder:
        return run(options, rest, certificate(Path(folder)))


def run(options: argparse.Namespace, rest: list[str], places: dict[str, str]) -> int:
    """Start scheduler and jobs, and the run on them; its exit code."""
    security = Security(
        require_encryption=True,
        tls_ca_file=places["ca-file"],
        **{
            f"tls_{role}_{what}": places[what] for role in ("client", "scheduler", "worker") for what in ("cert", "key")
        },
    )
    # One process and one thread a job: a worker keeps one encoder, and reads with threads of its own.
    common = {
        "cores": 4,
        "processes": 1,
        "memory": options.memory,
        "walltime": options.walltime,
        "interface": options.interface,
        "protocol": "tls://",
        "security": security,
        "scheduler_options": {"dashboard": False},
    }
    with SLURMCluster(queue=options.cpu_partition, worker_extra_args=["--nthreads", "1"], **common) as cluster:
        cluster.scale(jobs=options.cpu_jobs)
        command = [sys.executable, "-m", "wsi_pipe", "run", *rest, "--scheduler", cluster.scheduler_address]
        if not options.gpu_jobs:
            return subprocess.run(command, check=False, env=environment(places)).returncode
        # GPU jobs join the same scheduler and say so by a resource, which extraction then asks for.
        script = (
            f"#!/bin/sh\n#SBATCH -p {options.gpu_partition}\n#SBATCH --gres=gpu:1\n#SBATCH -c 8\n"
            f"#SBATCH --mem={options.memory.removesuffix('B')}\n#SBATCH -t {options.walltime}\n"
            f"exec dask worker {cluster.scheduler_address} --nthreads 1 --resources GPU=1 --no-dashboard"
            f" --death-timeout 300{f' --interface {options.interface}' if options.interface else ''}"
            f" --tls-ca-file {places['ca-file']} --tls-cert {places['cert']} --tls-key {places['key']}\n"
        )
        jobs = []
        try:
            for _ in range(options.gpu_jobs):
                done = subprocess.run(
                    ["sbatch", "--parsable"], input=script, text=True, check=True, capture_output=True
                )
                jobs.append(done.stdout.strip().split(";")[0])
            return subprocess.run([*command, "--resources", "GPU=1"], check=False, env=environment(places)).returncode
        finally:
            # Jobs that wait in the queue, or for a scheduler that is gone, would hold GPUs until their time is up.
            if jobs:
                subprocess.run(["scancel", *jobs], check=False)


if __name__ == "__main__":
    sys.exit(main())
