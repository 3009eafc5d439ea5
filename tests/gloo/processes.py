"""Run a function on several ranks in forked processes, so that megatron-core is imported once, by the parent."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time; the message names it and shows its traceback."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo world and return the results in rank order.

    The first failure ends the other ranks.

    Args:
        world_size: number of processes; each runs one thread.
        function: called with torch.distributed initialised; its result is pickled.
        timeout_s: for all ranks together.

    Raises:
        RankFailed: with the traceback of the first rank that failed.
    """
    fork, pipes, processes = multiprocessing.get_context("fork"), [], []
    # Where they find each other: a port may be taken by the time they listen.
    place = tempfile.TemporaryDirectory(prefix="ranks-")
    met = os.path.join(place.name, "met")
    for rank in range(world_size):
        receiving, sending = fork.Pipe(duplex=False)
        process = fork.Process(target=_rank_main, args=(sending, rank, world_size, met, timeout_s, function, args))
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    grace = 0.0
    try:
        results = _results(pipes, processes, timeout_s)
        grace = 10.0
        return results
    finally:
        for process in processes:
            process.join(grace)  # on success ranks are on their way out
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the rank's own group, with what it started
            process.join()
        place.cleanup()


def _results(pipes: list[Connection], processes: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailed(f"ranks {late} did not finish in {timeout_s:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failed, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                failed, value = True, f"died with exit code {processes[rank].exitcode}"
            if failed:
                raise RankFailed(f"rank {rank}: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    sending: Connection, rank: int, world_size: int, met: str, timeout_s: float, function: Callable, args: tuple
) -> None:
    os.setpgrp()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=f"file://{met}", rank=rank, world_size=world_size, timeout=timeout)
        result = function(*args)
        dist.barrier()
        sending.send_bytes(pickle.dumps((False, result)))  # tensors by value: this process is about to end
    except BaseException:
        sending.send_bytes(pickle.dumps((True, traceback.format_exc())))
    finally:
        sending.close()
