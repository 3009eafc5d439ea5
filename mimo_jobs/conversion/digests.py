"""blake3 digests of tensors' bytes, shared out over ranks and threads."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimo_jobs.parallel.world import World
from mimo_jobs.weights import transfer
from mimo_jobs.weights.dtypes import Cast

# name, file, offset, bytes, cast applied before hashing
DigestJob = tuple[str, Path, int, int, Cast | None]


def file_threads(world_size: int) -> int:
    """Threads that move bytes in one rank: the cores it may use, shared with the node's other ranks, at most 4."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or min(world_size, 8))
    return max(1, min(4, len(os.sched_getaffinity(0)) // max(1, local)))


def tensor_digests(
    jobs: Sequence[DigestJob], files: transfer.Files, world: World, phase: str, total: int
) -> dict[str, str]:
    """name -> hex digest of each job's bytes. ``total``: bytes over all ranks, for progress."""
    from blake3 import blake3

    found: dict[str, str] = {}
    with world.phase(phase, total) as moved:

        def one(job: DigestJob) -> None:
            name, path, offset, nbytes, cast = job
            digest = blake3()
            for block in transfer.blocks(files.reader(path), offset, nbytes):
                digest.update(cast(block) if cast else block)
                moved(len(block))
            found[name] = digest.hexdigest()

        transfer.run_all([lambda j=j: one(j) for j in jobs], file_threads(world.size))
    return found


def merged(results: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """One dict from the dicts that every rank has under ``key``."""
    return {name: value for part in results for name, value in part[key].items()}


def slowest(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Per phase, the wall seconds of the rank that took longest."""
    phases = dict.fromkeys(name for part in results for name in part["seconds"])
    return {name: round(max(part["seconds"].get(name, 0.0) for part in results), 4) for name in phases}
