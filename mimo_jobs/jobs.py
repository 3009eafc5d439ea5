"""The seam between the submit side (recipes configure these functions) and the ranks (the worker calls them).

Plain functions with keyword arguments that survive JSON. Each imports the worker side when it is called. A rank passes
its ``world``; a caller that leaves it out becomes the only rank of a world of one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mimo_jobs.layout import ParallelLayout

if TYPE_CHECKING:
    from mimo_jobs.parallel.world import World

Dir = Annotated[str, "directory"]
File = Annotated[str, "file"]
ModelRef = Annotated[str, "directory or hub id"]
Dtype = Literal["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"]
Mtp = Literal["keep", "drop"]


def import_hf(
    *,
    model: ModelRef,
    target: Dir,
    layout: ParallelLayout,
    dtype: Dtype | None = None,
    mtp: Mtp = "keep",
    overwrite: bool = False,
    fsync: bool = True,
    world: "World | None" = None,
) -> dict[str, Any]:
    """Convert a Hugging Face checkpoint to a MIMO checkpoint.

    Args:
        model: Hugging Face checkpoint
        target: MIMO checkpoint to write
        layout: ranks of each component
        dtype: cast every tensor; without it each keeps its own
        mtp: multi-token-prediction tensors: carry them, or drop them
        overwrite: replace target once the new one is complete
        fsync: flush to disk before publishing

    Raises:
        UserError: the checkpoint, the target or the layout does not allow it; nothing is published.
    """
    from mimo_jobs.conversion.importer import ImportArgs, run_import

    with _joined(world) as joined:
        args = ImportArgs(Path(model), Path(target), layout.resolve(), dtype, mtp, overwrite, fsync)
        return run_import(args, joined)


def export_hf(
    *,
    source: Dir,
    target: Dir,
    layout: ParallelLayout,
    dtype: Dtype | None = None,
    mtp: Mtp = "keep",
    overwrite: bool = False,
    fsync: bool = True,
    verify: bool = True,
    adapter: Dir | None = None,
    world: "World | None" = None,
) -> dict[str, Any]:
    """Convert a MIMO checkpoint back to Hugging Face format, with the shards and dtypes it was imported from.

    Args:
        source: MIMO checkpoint
        target: Hugging Face checkpoint to write
        layout: ranks of each component; need not be the one that wrote source
        dtype: cast every tensor; without it each keeps its own
        mtp: multi-token-prediction tensors: restore them, or drop them
        overwrite: replace target once the new one is complete
        fsync: flush to disk before publishing
        verify: check the digests of what was written before publishing
        adapter: PEFT directory to merge into the weights

    Raises:
        UserError: the checkpoint, the adapter, the target or the layout does not allow it; nothing is published.
    """
    from mimo_jobs.conversion.exporter import ExportArgs, run_export

    with _joined(world) as joined:
        merged = Path(adapter) if adapter else None
        args = ExportArgs(Path(source), Path(target), layout.resolve(), dtype, mtp, overwrite, fsync, verify, merged)
        return run_export(args, joined)


def make_tiny(*, target: Dir, seed: int = 0, overwrite: bool = False, world: "World | None" = None) -> dict[str, Any]:
    """Write a tiny random Qwen3.5-VL checkpoint in Hugging Face format.

    Args:
        target: Hugging Face checkpoint to write
        seed: seed of the random values
        overwrite: replace target

    Raises:
        UserError: target exists.
    """
    from mimo_jobs.conversion import tiny

    with _joined(world) as joined:
        return tiny.make_tiny(target, seed, overwrite, progress=joined.progress)


def compare_logits(*, left: Dir, right: Dir, world: "World | None" = None) -> dict[str, Any]:
    """Load two Hugging Face checkpoints with transformers and compare their logits bit for bit.

    Args:
        left: Hugging Face checkpoint
        right: Hugging Face checkpoint; its processor makes the inputs

    Raises:
        JobFailed: the logits differ.
        UserError: a checkpoint does not load.
    """
    from mimo_jobs.conversion import logits

    with _joined(world) as joined:

        def report(phase: str, done: int, total: int) -> None:
            joined.progress(phase, done, total, "steps")

        return logits.compare_logits(left, right, report)


def verify(
    *,
    left: Dir,
    right: Dir,
    certificate: File | None = None,
    dtype: Dtype | None = None,
    mtp: Mtp = "keep",
    world: "World | None" = None,
) -> dict[str, Any]:
    """Compare two Hugging Face checkpoints byte for byte; returns the parity certificate.

    Args:
        left: Hugging Face checkpoint
        right: Hugging Face checkpoint
        certificate: file for the certificate of two that are equal
        dtype: what right was cast to
        mtp: drop when right was exported without the multi-token-prediction tensors

    Raises:
        JobFailed: they differ.
        UserError: a checkpoint cannot be read.
    """
    from mimo_jobs.conversion.verify import certify

    with _joined(world) as joined:

        def report(done: int, total: int) -> None:
            joined.progress("compare", done, total)

        return certify(left, right, Path(certificate) if certificate else None, report, dtype, mtp)


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (import_hf, export_hf, make_tiny, compare_logits, verify)
}


@contextmanager
def _joined(world: "World | None") -> Iterator["World"]:
    if world is not None:
        yield world
        return
    from mimo_jobs.parallel.world import World

    with World.from_env() as own:
        yield own
