"""Where jobs run: processes of this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from peml.errors import PemlError

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that say how many threads the libraries below torch use."""


class Runner(Protocol):
    """What runs jobs.

    Args:
        places: jobs that it runs at a time; None: not known here. What is submitted beyond them waits in the order in
            which it came, which need not be the order in which it is wanted.
    """

    places: int | None

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        """Run a job when there is room; the future has its exit status."""

    def close(self) -> None:
        """Stop everything that still runs."""


class LocalRunner:
    """Processes of this machine, so many at a time.

    Args:
        workers: processes at a time.
        threads: of each.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.threads = threads
        self.places: int | None = workers
        self.pool = ThreadPoolExecutor(workers)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.closed = False
        self.gpus: SimpleQueue[str] = SimpleQueue()
        for place in range(workers):
            self.gpus.put(gpu_of(place))

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        """Run a job when a worker is free."""
        return self.pool.submit(self._run, command, log)

    def _run(self, command: Sequence[str], log: Path) -> int:
        gpu = self.gpus.get()
        try:
            with log.open("wb") as out, start(command, out, self.threads, gpu) as process:
                self.running.add(process)
                # A job that was begun while everything was being stopped.
                if self.closed:
                    process.kill()
                try:
                    return process.wait()
                finally:
                    self.running.discard(process)
        finally:
            self.gpus.put(gpu)

    def close(self) -> None:
        """Kill what runs: a job that was killed goes on where it was."""
        self.closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self.running):
            process.kill()
        self.pool.shutdown(wait=True)


class RayRunner:
    """Tasks of a Ray cluster, which see the same folders as this machine.

    Args:
        address: of the cluster; "auto": the one that this machine belongs to; "local": a new one on it.
        threads: CPUs of a task.

    Raises:
        PemlError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str, threads: int) -> None:
        try:
            import ray
        except ImportError:
            raise PemlError("--ray needs Ray: pip install 'peml[ray]'") from None
        try:
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
        except Exception as error:  # Ray has an error type for every way in which a cluster is not there
            raise PemlError(f"--ray {address}: there is no cluster ({error})") from error
        self.ray, self.threads = ray, threads
        self.places: int | None = None  # a cluster may grow
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        # A job that failed says why; trying it again would hide that.
        self.remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(run_command)

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        """Run a job where the cluster has room."""
        future: Future[int] = self.remote.remote(list(command), str(log.resolve()), self.threads).future()
        return future

    def close(self) -> None:
        """Leave the cluster, which stops the tasks of this comparison."""
        self.ray.shutdown()


def run_command(command: Sequence[str], log: str, threads: int) -> int:
    """Run one job in a process and wait for it; what a Ray task does."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("wb") as out, start(command, out, threads) as process:
        return process.wait()


def start(command: Sequence[str], out: Any, threads: int, gpu: str = "") -> subprocess.Popen[bytes]:
    """The process of a job.

    Args:
        command: kind, source and output.
        out: where it prints.
        threads: that it may use.
        gpu: that it sees; "": all.
    """
    own: Mapping[str, str] = dict.fromkeys(_THREADS, str(threads)) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    return subprocess.Popen(
        [sys.executable, "-m", "peml.compare.worker", *command],
        stdin=subprocess.PIPE,  # ends when this process does, and the job with it
        stdout=out,
        stderr=subprocess.STDOUT,
        env={**os.environ, **own},
    )


def gpu_of(place: int) -> str:
    """The GPU of a worker, in turn; "" where there is none to choose."""
    count = torch.cuda.device_count()
    if count < 2:
        return ""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(count)]
    return names[place % count]


def share(workers: int) -> int:
    """Threads of each of several processes: those that this process may use, shared evenly."""
    return max(1, torch.get_num_threads() // workers)
