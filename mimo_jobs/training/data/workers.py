"""A function over tasks, in order, in worker processes: torch's DataLoader set up for ranks of a training run.

Workers come from a fork server: a rank has threads, NCCL and CUDA, which a fork of it would copy in whatever state they are.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mimo_jobs.errors import UserError

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_started: set[Any] = set()  # worker processes of iterators that are open


@dataclass(frozen=True)
class Defect:
    """An exception that nobody foresaw, as the worker saw it."""

    text: str


class _Tasks(Dataset):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, task: Any) -> Any:
        try:
            return self.function(task)
        except Exception:
            return Defect(traceback.format_exc())


def in_order(function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, ahead: int) -> Iterator[Any]:
    """``function(task)`` of every task, in order, at least ``ahead`` tasks ahead of the one that is asked for.

    Args:
        function: picklable; runs in this process when ``workers`` is 0
        tasks: asked for in this process, when workers have room for them
        workers: processes; they end with the iterator, and with this process however it ends

    Raises:
        RuntimeError: ``function`` raised; has the traceback of the worker.
        UserError: a worker was killed.
    """
    loader = DataLoader(
        _Tasks(function),
        batch_size=None,
        sampler=tasks,  # pyright: ignore[reportArgumentType]
        collate_fn=_same,
        num_workers=workers,
        prefetch_factor=-(-ahead // workers) if workers else None,
        multiprocessing_context=_context() if workers else None,
        worker_init_fn=_start_worker if workers else None,
        persistent_workers=bool(workers),
        generator=torch.Generator(),  # the default one is the run's: drawing from it would change dropout
    )
    others = set(multiprocessing.active_children())
    results = iter(loader)
    mine = set(multiprocessing.active_children()) - others
    _started.update(mine)
    try:
        yield from _checked(results)
    finally:
        del results, loader  # the DataLoader ends its workers when nobody has it any more
        _started.difference_update(mine)


def _checked(results: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that reads data ended ({error}). It was killed, most likely for memory: "
                "lower dataset.workers or dataset.prefetch, or give /dev/shm more room"
            ) from error
        if isinstance(result, Defect):
            raise RuntimeError(f"reading data failed\n{result.text}")
        yield result


@atexit.register
def _kill_workers() -> None:
    """Those of iterators that were left open: multiprocessing would send SIGTERM, which they ignore, and wait for ever."""
    for process in _started:
        process.kill()


def _same(value: Any) -> Any:
    return value


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mimo_jobs.training.data.fork_server"])  # imports once, not in every worker
    return context


def _start_worker(_: int) -> None:
    """Signals of a job (Slurm sends them to all of its processes) are the rank's to handle; it ends its workers in order."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        # the fork server is this process's parent and outlives a killed rank, so torch's own watch would see nothing
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    connection.wait([sentinel])
    os._exit(1)
