"""blake3 digests of tensors' bytes, shared out over ranks and threads."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mimo_jobs.parallel.world import World
from mimo_jobs.weights import transfer
from mimo_jobs.weights.dtypes import Cast
from mimo_jobs.weights.safetensors_io import TensorInfo

# Makes a fresh iterator over a tensor's bytes, in blocks of the calling thread's buffer.
Blocks = Callable[[], Iterator[memoryview]]


def file_threads(world_size: int) -> int:
    """Threads that move bytes in one rank: the cores it may use, shared with the node's other ranks, at most 4."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or min(world_size, 8))
    return max(1, min(4, len(os.sched_getaffinity(0)) // max(1, local)))


def file_blocks(files: transfer.Files, directory: Path, info: TensorInfo, cast: Cast | None = None) -> Blocks:
    """The bytes of a tensor of a ``.safetensors`` file, cast if asked."""

    def read() -> Iterator[memoryview]:
        for block in transfer.blocks(files.reader(directory / info.file), info.offset, info.nbytes):
            yield cast(block) if cast else block

    return read


def tensor_digests(jobs: Sequence[tuple[str, Blocks]], world: World, phase: str, total: int) -> dict[str, str]:
    """name -> hex digest of each job's bytes. ``total``: bytes over all ranks, for progress."""
    from blake3 import blake3

    found: dict[str, str] = {}
    with world.phase(phase, total) as moved:

        def one(name: str, read: Blocks) -> None:
            digest = blake3()
            for block in read():
                digest.update(block)
                moved(len(block))
            found[name] = digest.hexdigest()

        transfer.run_all([partial(one, *job) for job in jobs], file_threads(world.size))
    return found


def merged(results: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """One dict from the dicts that every rank has under ``key``."""
    return {name: value for part in results for name, value in part[key].items()}


def slowest(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Per phase, the wall seconds of the rank that took longest."""
    phases = dict.fromkeys(name for part in results for name in part["seconds"])
    return {name: round(max(part["seconds"].get(name, 0.0) for part in results), 4) for name in phases}
