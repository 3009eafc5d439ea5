"""torch.distributed for the ranks of a job: NCCL with one GPU a rank, or gloo without GPUs."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from mimo_jobs.errors import UsageError
from mimo_jobs.parallel.world import World

TIMEOUT = timedelta(hours=1)  # a rank that died is noticed by World; loading a large checkpoint may take its time


@contextmanager
def distributed(world: World) -> Iterator[torch.device]:
    """Initialise torch.distributed for the ranks of ``world``; yields this rank's device.

    Raises:
        UsageError: there are GPUs on this node, but none for this rank.
    """
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host, port = _address(world)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    failed = True
    try:
        yield device
        failed = False
    finally:
        if not failed:  # after a failure other ranks may wait in a collective: the process ends without this
            dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0), torch.cuda.device_count()
    if count == 1 and "SLURM_LOCALID" in os.environ:  # bound to its own by Slurm
        local = 0
    if local >= count:
        raise UsageError(f"rank {local} of {socket.gethostname()} has no GPU: the node shows {count}; use a smaller layout")
    return torch.device("cuda", local)


def _address(world: World) -> tuple[str, int]:
    """Where rank 0 listens; it need not be on the first node."""
    found = None
    if world.rank == 0:
        with socket.socket() as server:
            server.bind(("", 0))
            found = [socket.gethostname(), server.getsockname()[1]]
    host, port = world.broadcast("torch.distributed", found)
    return "127.0.0.1" if host == socket.gethostname() else host, port
