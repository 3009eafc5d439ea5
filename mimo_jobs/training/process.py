"""torch.distributed for the ranks of a job: NCCL with one GPU a rank, or gloo without GPUs."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.parallel.world import World

NEWS_SECONDS = 2.0
TIMEOUT = timedelta(hours=1)  # a rank that died is noticed by World; loading a large checkpoint may take its time


@contextmanager
def distributed(world: World) -> Iterator[torch.device]:
    """Initialise torch.distributed for the ranks of ``world``; yields this rank's device.

    Raises:
        UsageError: there are GPUs on this node, but none for this rank.
        JobFailed: something failed within because another rank did.
    """
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store(world),
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    failed = True
    try:
        yield device
        failed = False
    except (UserError, OSError):
        raise
    except Exception:
        _hear_of_others(world)
        raise
    finally:
        if not failed:  # after a failure other ranks may wait in a collective: the process ends without this
            dist.destroy_process_group()


def _hear_of_others(world: World) -> None:
    """Raise what another rank failed of, if one did: its end breaks collectives here, often before the news of it comes."""
    deadline = time.monotonic() + NEWS_SECONDS
    while world.size > 1 and world.failure is None and time.monotonic() < deadline:
        time.sleep(0.02)
    world.check()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0), torch.cuda.device_count()
    if count == 1 and "SLURM_LOCALID" in os.environ:  # bound to its own by Slurm
        local = 0
    if local >= count:
        raise UsageError(
            f"rank {local} of {socket.gethostname()} has no GPU: the node shows {count}; use a smaller layout"
        )
    return torch.device("cuda", local)


def _store(world: World) -> TCPStore:
    """Where the ranks find each other; rank 0 serves it on a port that the system chose."""
    served = None
    if world.rank == 0:
        served = TCPStore(world.main_host, 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    port = world.broadcast("torch.distributed", served.port if served is not None else None)
    return served or TCPStore(world.main_host, port, is_master=False, timeout=TIMEOUT)
