"""Training steps on CUDA and NCCL: loss, every gradient, updates and checkpoints against transformers, in every layout class.

One command: ``python -m pytest tests/gpu``.
"""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="no CUDA device"), pytest.mark.timeout(540)]

COLOCATED_FAN_IN = ParallelLayout(Layout(tp=2), Layout(dp=2), 2)
LAYOUTS: dict[int, dict[str, tuple[ParallelLayout, dict[str, Any]]]] = {
    1: {
        "one rank": (ParallelLayout(Layout(), Layout(), 1), {}),
        "one rank, recomputation of the MLPs": (ParallelLayout(Layout(), Layout(), 1), dict(recompute="selective")),
        "one rank, recomputation": (ParallelLayout(Layout(), Layout(), 1), dict(recompute="full")),
    },
    2: {
        "colocated tp2 / dp2": (COLOCATED_FAN_IN, {}),
        "colocated tp2 / dp2, sequence parallel": (COLOCATED_FAN_IN, dict(sp=True)),
        "colocated dp2 / tp2": (ParallelLayout(Layout(dp=2), Layout(tp=2), 2), {}),
        "language | images": (ParallelLayout(Layout(), Layout(rank_offset=1), 2), {}),
        "language | images, text only": (ParallelLayout(Layout(), Layout(rank_offset=1), 2), dict(text_only=True)),
        "language | images, images frozen": (ParallelLayout(Layout(), Layout(rank_offset=1), 2), dict(frozen="images")),
    },
    4: {
        "tp2 | dp2": (ParallelLayout(Layout(tp=2), Layout(dp=2, rank_offset=2), 4), dict(sp=True)),
        "dp2 pp1 | dp1": (ParallelLayout(Layout(dp=2), Layout(dp=2, rank_offset=2), 4), {}),
        "pp2 | tp2, tied": (ParallelLayout(Layout(pp=2), Layout(tp=2, rank_offset=2), 4), dict(tied=True)),
    },
}  # fmt: skip
TOLERANCE, CANCELLING = 1e-4, ("A_log", "dt_bias")  # sums with heavy cancellation, compared to 2e-3
SAMPLES, MICROBATCHES = 8, 2


# Few layouts a process: each model makes some twenty NCCL communicators.
PARTS = [(world, first) for world in LAYOUTS for first in range(0, len(LAYOUTS[world]), 3)]


@pytest.mark.parametrize(("world", "first"), PARTS)
def test_training_on_nccl_is_that_of_transformers(tmp_path: Path, world: int, first: int) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} CUDA devices, found {GPUS}")
    from tests.gloo.batches import tiny
    from tests.gloo.training import exact, samples_of_a_run

    for tied in {bool(options.get("tied")) for _, options in LAYOUTS[world].values()}:
        config, model = tiny(tied=tied)
        wanted: dict[str, Any] = {"config": config, "weights": model.state_dict()}
        for text_only in (False, True):
            samples = samples_of_a_run(config, SAMPLES, text_only=text_only)
            wanted[f"text_only={text_only}"] = exact(model, samples)
        torch.save(wanted, tmp_path / f"tied={tied}.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (world, first, port, tmp_path), nprocs=world)


def _rank(rank: int, world: int, first: int, port: int, work: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    torch.compiler.set_stance("force_eager")  # compiling megatron-core's small fused parts took most of 9 minutes
    for name, (layout, options) in list(LAYOUTS[world].items())[first : first + 3]:
        wanted = torch.load(work / f"tied={bool(options.get('tied'))}.pt", weights_only=False)
        _gradients(name, layout, options, wanted)
        _bf16_resume(name, layout, options, wanted, work / name.replace(" ", "_").replace("/", "_"))
    dist.barrier()
    dist.destroy_process_group()


def _made(layout: ParallelLayout, options: dict[str, Any], wanted: Any, dtype: torch.dtype, sharded: bool) -> Any:
    from mimo_jobs.modeling.build import build
    from mimo_jobs.training.run import RECOMPUTE
    from mimo_jobs.training.step import component_module, wrap_for_training
    from tests.gloo.reference_weights import load_reference

    overrides = dict.fromkeys(("language", "images"), RECOMPUTE[options.get("recompute", "none")])
    built = build(
        wanted["config"], layout.resolve(), dtype=dtype, sequence_parallel=options.get("sp", False), overrides=overrides
    )
    load_reference(built, {n: t.cuda() for n, t in wanted["weights"].items()})
    if (frozen := options.get("frozen")) in built.groups:
        component_module(built, str(frozen)).requires_grad_(False)
    wrap_for_training(built, sharded=sharded)
    return built


def _step(built: Any, layout: ParallelLayout, options: dict[str, Any], config: Any) -> tuple[Any, Any, int]:
    from mimo_jobs.training.batches import Shares
    from tests.gloo.training import microbatches_of, samples_of_a_run, table_of

    resolved = layout.resolve()
    samples = samples_of_a_run(config, SAMPLES, text_only=options.get("text_only", False))
    dp = resolved.components["language"].dp
    shares = Shares(dp, resolved.components["images"].dp, SAMPLES // MICROBATCHES // dp, MICROBATCHES)
    table = table_of(samples, [[i] for i in range(SAMPLES)])
    made = microbatches_of(built, samples, table, shares)
    total = table.total(table.loss_tokens)
    return [m.pinned().to(torch.device("cuda", torch.cuda.current_device())) for m in made], table, total


def _gradients(name: str, layout: ParallelLayout, options: dict[str, Any], wanted: Any) -> None:
    """fp32: loss and every gradient."""
    from mimo_jobs.training.step import run_step
    from mimo_jobs.training.stopwatch import Stopwatch
    from tests.gloo.reference_weights import live_parameters, reference_parameters

    loss, gradients, _ = wanted[f"text_only={options.get('text_only', False)}"]
    built = _made(layout, options, wanted, torch.float32, sharded=False)
    microbatches, _, total = _step(built, layout, options, wanted["config"])
    found = run_step(built, microbatches, total, Stopwatch()).double() / total
    dist.all_reduce(found)
    assert abs(found.item() - loss) < 1e-5 * loss, (name, found.item(), loss)
    theirs, squares = reference_parameters(built, gradients), {}
    for n, parameter in live_parameters(built).items():
        if parameter.requires_grad:
            error = (parameter.main_grad.cpu() - theirs[n]).square().sum().item()  # pyright: ignore
            squares[n] = (error, theirs[n].square().sum().item())
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, squares)
    for n in {n for part in parts for n in part}:
        error, norm = (sum(part[n][i] for part in parts if n in part) ** 0.5 for i in (0, 1))
        bound = 2e-3 if n.endswith(CANCELLING) else TOLERANCE
        assert error <= bound * norm, (name, n, error / norm if norm else error)
    if dist.get_rank() == 0:
        print(f"{name}: loss {found.item():.7f}, {len(squares)} gradients of rank 0 as in transformers", flush=True)


def _bf16_resume(name: str, layout: ParallelLayout, options: dict[str, Any], wanted: Any, root: Path) -> None:
    """bf16: four steps, and the last two again from a checkpoint written in the background."""
    from mimo_jobs.training.checkpoints import Checkpoints
    from mimo_jobs.training.config import Optimizer
    from mimo_jobs.training.optimizer import make_optimizer
    from mimo_jobs.training.saved import Saved, newest
    from mimo_jobs.training.step import run_step
    from mimo_jobs.training.stopwatch import Stopwatch

    settings, curves = Optimizer(lr=1e-3), []
    for first in (0, 2):
        built = _made(layout, options, wanted, torch.bfloat16, sharded=True)
        updates = make_optimizer(built, settings, 4)
        checkpoints = Checkpoints(built, updates, root, 2, True, adapters=False)
        if first:
            found = newest(root, {}, print)
            assert found is not None and found[1].step == 2
            checkpoints.load(found[0])
        curve = []
        for step in range(first, 4):
            updates.set_step(step)
            microbatches, _, total = _step(built, layout, options, wanted["config"])
            loss = run_step(built, microbatches, total, Stopwatch()).double() / total
            dist.all_reduce(loss)
            assert updates.apply().item() > 0
            curve.append(loss.item())
            if not first and step == 1:
                checkpoints.save(Saved(2, {}))
        checkpoints.wait()
        curves.append(curve)
    assert curves[0][-1] < curves[0][0], (name, curves)
    # Atomics make CUDA's sums depend on their order.
    assert all(abs(a - b) < 2e-2 * a for a, b in zip(curves[0][2:], curves[1], strict=True)), (name, curves)
    if dist.get_rank() == 0:
        print(f"{name}: bf16 {curves[0]}, resumed {curves[1]}", flush=True)
