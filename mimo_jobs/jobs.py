"""The seam between the submit side (recipes configure these functions) and the ranks (the worker calls them).

Plain functions with keyword arguments that survive JSON. Each imports the worker side when it is called. A rank passes
its ``world``; a caller that leaves it out becomes the only rank of a world of one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mimo_jobs.layout import ParallelLayout
from mimo_jobs.training.config import DataRef, Dataset, Dir, Logging, Lora, Optimizer, Saving, Stop, Validation

if TYPE_CHECKING:
    from mimo_jobs.parallel.world import World

File = Annotated[str, "file"]
ModelRef = Annotated[str, "directory or hub id"]
Dtype = Literal["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"]
Mtp = Literal["keep", "drop"]
Precision = Literal["bf16", "fp32"]
Recompute = Literal["none", "selective", "full"]
Freeze = Literal["none", "language", "images"]


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


def sft(
    *,
    source: ModelRef,
    data: DataRef,
    target: Dir,
    layout: ParallelLayout,
    steps: int | None = None,
    epochs: float = 1.0,
    global_batch_size: int = 32,
    micro_batch_size: int = 1,
    seed: int = 0,
    precision: Precision = "bf16",
    freeze: Freeze = "none",
    sequence_parallel: bool = False,
    recompute: Recompute = "full",
    optimizer: Optimizer = Optimizer(),
    dataset: Dataset = Dataset(),
    validation: Validation = Validation(),
    saving: Saving = Saving(),
    logging: Logging = Logging(),
    stop: Stop = Stop(),
    overwrite: bool = False,
    world: "World | None" = None,
) -> dict[str, Any]:
    """Fine-tune every parameter on images and text; goes on from the newest checkpoint when started again.

    Args:
        source: MIMO or Hugging Face checkpoint to begin with
        data: images and text: JSONL, Parquet, WebDataset or a hub data set
        target: MIMO checkpoint to write
        layout: ranks of each component
        steps: optimizer steps; without it as many as epochs has
        epochs: passes over the data; may be a fraction
        global_batch_size: samples of an optimizer step (packed sequences with dataset.packing)
        micro_batch_size: samples of one forward pass of a language replica
        seed: of the order of samples, and of adapters
        precision: of weights and activations; gradients and optimizer state are fp32
        freeze: a component that does not train
        sequence_parallel: split the decoder's activations over tp along the sequence
        recompute: compute activations again in the backward pass instead of keeping them; selective: those of the MLPs, the largest
        overwrite: replace target once the new one is complete

    Raises:
        UserError: bad input; JobFailed: the loss went wrong. Checkpoints stay.
    """
    return _train("sft", **locals())


def lora(
    *,
    source: ModelRef,
    data: DataRef,
    target: Dir,
    layout: ParallelLayout,
    steps: int | None = None,
    epochs: float = 1.0,
    global_batch_size: int = 32,
    micro_batch_size: int = 1,
    seed: int = 0,
    precision: Precision = "bf16",
    sequence_parallel: bool = False,
    recompute: Recompute = "full",
    lora: Lora = Lora(),
    optimizer: Optimizer = Optimizer(lr=1e-4),
    dataset: Dataset = Dataset(),
    validation: Validation = Validation(),
    saving: Saving = Saving(),
    logging: Logging = Logging(),
    stop: Stop = Stop(),
    overwrite: bool = False,
    world: "World | None" = None,
) -> dict[str, Any]:
    """Fine-tune low-rank adapters on images and text; goes on from the newest checkpoint when started again.

    Args:
        source: MIMO or Hugging Face checkpoint that the adapters are for
        data: images and text: JSONL, Parquet, WebDataset or a hub data set
        target: PEFT directory to write
        layout: ranks of each component
        steps: optimizer steps; without it as many as epochs has
        epochs: passes over the data; may be a fraction
        global_batch_size: samples of an optimizer step (packed sequences with dataset.packing)
        micro_batch_size: samples of one forward pass of a language replica
        seed: of the order of samples, and of adapters
        precision: of weights and activations; adapters, gradients and optimizer state are fp32
        sequence_parallel: split the decoder's activations over tp along the sequence
        recompute: compute activations again in the backward pass instead of keeping them; selective: those of the MLPs, the largest
        overwrite: replace target once the new one is complete

    Raises:
        UserError: bad input; JobFailed: the loss went wrong. Checkpoints stay.
    """
    return _train("lora", **locals())


def _train(job: str, world: "World | None", **given: Any) -> dict[str, Any]:
    """What `sft` and `lora` do with their arguments."""
    from mimo_jobs.conversion import identity
    from mimo_jobs.training.args import TrainArgs
    from mimo_jobs.training.run import run_training

    made_of = identity.expected(job, given, {})
    assert made_of is not None
    places = {"source": Path(given["source"]), "target": Path(given["target"]), "layout": given["layout"].resolve()}
    args = TrainArgs(**({"freeze": "none", "lora": None} | given | places), identity=made_of)
    with _joined(world) as joined:
        return run_training(args, joined)


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


def make_data(
    *, target: Dir, samples: int = 64, seed: int = 0, overwrite: bool = False, world: "World | None" = None
) -> dict[str, Any]:
    """Write a tiny image-text set: JSONL with chat messages, and PNGs.

    Args:
        target: directory to write
        samples: how many
        seed: of what is drawn
        overwrite: replace target

    Raises:
        UserError: target exists.
    """
    from mimo_jobs.training import tiny_data

    with _joined(world):
        return tiny_data.make_data(target, samples, seed, overwrite)


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
    f.__name__: f for f in (import_hf, sft, lora, export_hf, make_tiny, make_data, compare_logits, verify)
}


@contextmanager
def _joined(world: "World | None") -> Iterator["World"]:
    if world is not None:
        yield world
        return
    from mimo_jobs.parallel.world import World

    with World.from_env() as own:
        yield own
