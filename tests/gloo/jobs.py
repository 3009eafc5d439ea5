"""Jobs in forked worker processes: the entry that users run, `mimo_jobs.worker.main`, without the seconds its imports take."""

import atexit
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_jobs import worker
from mimo_jobs.conversion.preflight import as_layout
from mimo_jobs.training import history
from tests.conversion_ranks import job_file

ONE = {"language": {}, "images": {}, "world_size": 1}
DATA_PARALLEL = {"language": {"dp": 2}, "images": {"dp": 2, "rank_offset": 0}, "world_size": 2}
FAN_IN = {"language": {"tp": 2}, "images": {"dp": 2, "rank_offset": 0}, "world_size": 2}
DISJOINT = {"language": {}, "images": {"rank_offset": 1}, "world_size": 2}
DISJOINT_PP = {"language": {"pp": 2}, "images": {"rank_offset": 2}, "world_size": 3}
SETTINGS: dict[str, Any] = {
    "steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "recompute": "none",
    "optimizer": {"lr": 1e-3}, "saving": {"every": 2}, "dataset": {"workers": 0}, "logging": {"tensorboard": False},
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """A job that is over: exit codes of its ranks, all they said, and their record."""

    codes: list[int]
    said: str
    record: Path
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        assert set(self.codes) == {0}, f"{self.codes}\n{self.said[-4000:]}"
        return json.loads((self.record / "result.json").read_text())["summary"]

    @property
    def error(self) -> dict[str, Any]:
        found = json.loads((self.record / "result.json").read_text())
        assert found["status"] == "failed", found
        return found["error"]

    @property
    def history(self) -> history.History:
        found = history.read(self.record)
        assert found is not None
        return found

    @property
    def losses(self) -> list[float]:
        return [values["loss"] for values in self.history.steps.values()]


class Job:
    """The ranks of a job under way; a context manager, after which none of them lives.

    Args:
        before: called in each rank before it begins, with its number; to put a fault in.
    """

    def __init__(
        self, record: Path, job: str, layout: dict, *, before: Callable[[int], None] | None = None, **arguments: Any
    ) -> None:
        self.record, self._before, self._started = record, before, time.monotonic()
        self._file = job_file(record, job, layout, arguments)
        size = as_layout(layout).resolve().world_size
        self._codes: dict[int, int] = {}
        self.pids = [self._fork(rank, size) for rank in range(size)]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for rank, pid in enumerate(self.pids):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # its data workers, too
            self._wait(rank, block=True)

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], signum)

    def end(self, timeout: float = 90) -> Ended:
        """Wait for all ranks; one that hangs is a failure, with a look at where."""
        deadline = time.monotonic() + timeout
        while len(self._codes) < len(self.pids):
            for rank in range(len(self.pids)):
                self._wait(rank)
            if time.monotonic() > deadline:
                late = [r for r in range(len(self.pids)) if r not in self._codes]
                for rank in late:
                    self.kill(rank, signal.SIGUSR2)  # faulthandler
                time.sleep(1)
                raise AssertionError(f"ranks {late} did not end in {timeout:g} s\n{self._said()[-8000:]}")
            time.sleep(0.02)
        codes = [self._codes[r] for r in range(len(self.pids))]
        return Ended(codes, self._said(), self.record, time.monotonic() - self._started)

    def wait_until(self, there: Callable[[], bool], timeout: float = 90) -> None:
        deadline = time.monotonic() + timeout
        while not there():
            for rank in range(len(self.pids)):
                self._wait(rank)
            assert time.monotonic() < deadline and not self._codes, (
                f"did not come: {self._codes}\n{self._said()[-4000:]}"
            )
            time.sleep(0.02)

    def _said(self) -> str:
        return "\n".join(p.read_text(errors="replace") for p in sorted(self.record.glob("rank-*.log")))

    def _wait(self, rank: int, block: bool = False) -> None:
        if rank in self._codes:
            return
        pid, status = os.waitpid(self.pids[rank], 0 if block else os.WNOHANG)
        if pid:
            self._codes[rank] = os.waitstatus_to_exitcode(status)

    def _fork(self, rank: int, size: int) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.setpgrp()
            self._become(rank, size)
            code = worker.main([str(self._file)])
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _become(self, rank: int, size: int) -> None:
        import faulthandler

        log = os.open(self.record / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        atexit._clear()  # pytest's
        from mimo_jobs.training.data import workers

        atexit.register(workers._kill_workers)
        faulthandler.enable(sys.stderr, all_threads=True)
        faulthandler.register(signal.SIGUSR2, sys.stderr, all_threads=True)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), OMP_NUM_THREADS="1")
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        if self._before is not None:
            self._before(rank)


def run_job(record: Path, job: str, layout: dict, *, timeout: float = 90, **arguments: Any) -> Ended:
    """Run a job to its end."""
    with Job(record, job, layout, **arguments) as started:
        return started.end(timeout)


def train(record: Path, layout: dict = ONE, *, job: str = "sft", timeout: float = 90, **arguments: Any) -> Ended:
    """Run a fine-tuning job with `SETTINGS`, its groups merged with those given."""
    return run_job(record, job, layout, timeout=timeout, **settings(arguments))


def settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """`SETTINGS` with others in their place; the groups of both are merged."""
    merged = {
        n: SETTINGS[n] | v if isinstance(SETTINGS.get(n), dict) and isinstance(v, dict) else v
        for n, v in arguments.items()
    }
    return SETTINGS | merged
