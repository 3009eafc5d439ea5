"""A job's worker processes, forked from one that has imported torch and megatron-core: they start in a moment."""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from mimo_jobs import worker
from mimo_jobs.conversion.preflight import as_layout
from tests.conversion_ranks import job_file


class ForkedRank:
    """One rank; enough of ``subprocess.Popen`` for tests."""

    def __init__(self, job: Path, rank: int, size: int, file_limit: int | None) -> None:
        self._said = tempfile.NamedTemporaryFile(mode="w+", prefix=f"rank{rank}-", suffix=".log")
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_main, args=(job, rank, size, file_limit, self._said.name))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise AssertionError(f"a rank did not end in {timeout:g} s; it said:\n{self.said()[-3000:]}")
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        self.wait(timeout)
        return None, self.said()

    def said(self) -> str:
        return Path(self._said.name).read_text()


def start_forked(
    record: Path, job: str, layout: dict, file_limit: dict[int, int] | None = None, **arguments: Any
) -> list[ForkedRank]:
    """As `conversion_ranks.start_worker`, without the seconds of imports."""
    size, file = as_layout(layout).resolve().world_size, job_file(record, job, layout, arguments)
    return [ForkedRank(file, rank, size, (file_limit or {}).get(rank)) for rank in range(size)]


def _main(job: Path, rank: int, size: int, file_limit: int | None, said: str) -> None:
    os.setsid()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os._exit(worker.main([str(job)]))

