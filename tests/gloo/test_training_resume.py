"""A run that was stopped and goes on equals one that was not: bit for bit in the same layout, to rounding in another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import build
from mimo_jobs.training.checkpoints import Checkpoints
from mimo_jobs.training.config import Optimizer
from mimo_jobs.training.optimizer import make_optimizer
from mimo_jobs.training.saved import Saved, newest
from mimo_jobs.training.step import wrap_for_training
from tests.gloo.batches import tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import live_parameters, load_reference
from tests.gloo.training import exact_run, samples_of_a_run, train_step

pytestmark = pytest.mark.gloo

FAN_IN = ParallelLayout(Layout(tp=2), Layout(dp=2), 2)
DISJOINT = ParallelLayout(Layout(pp=2), Layout(dp=1, rank_offset=2), 3)
PADDED = ParallelLayout(Layout(tp=2, dp=2), Layout(dp=4), 4)
THREE = ParallelLayout(Layout(tp=2), Layout(dp=1, rank_offset=2), 3)
DATA_PARALLEL = ParallelLayout(Layout(dp=2), Layout(dp=2), 2)
SETTINGS = Optimizer(lr=1e-3, warmup_steps=2, weight_decay=0.1, schedule="cosine")
STEPS, STOP, BATCH = 6, 3, 4


@pytest.mark.parametrize(
    ("before", "after", "dtype", "changes"),
    [
        (FAN_IN, FAN_IN, torch.float32, {}),
        (DISJOINT, DISJOINT, torch.float32, {"tied": True}),
        (DATA_PARALLEL, DATA_PARALLEL, torch.bfloat16, {}),
        (FAN_IN, DISJOINT, torch.float32, {"tied": True}),
        (DISJOINT, DATA_PARALLEL, torch.float32, {}),
        (PADDED, THREE, torch.float32, {"vocab_size": 321}),
        (DATA_PARALLEL, PADDED, torch.float32, {"vocab_size": 321, "tied": True}),
    ],
    ids=[
        "colocated fan-in",
        "disjoint pp2, tied",
        "bf16 dp2",
        "colocated tp2 to pp2, tied",
        "pp2 to dp2",
        "padded vocabulary, tp2 dp2 to tp2",
        "padded vocabulary, dp2 to tp2 dp2, tied",
    ],
)
def test_resume_equals_the_uninterrupted_run(
    tmp_path: Path, before: ParallelLayout, after: ParallelLayout, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    config, model = tiny(**changes)
    samples = samples_of_a_run(config, BATCH * STEPS)
    arguments = (config, model.state_dict(), samples, dtype, tmp_path)
    whole = run_ranks(before.resolve().world_size, _train, before, *arguments, 0, STEPS, STOP)
    rest = run_ranks(after.resolve().world_size, _train, after, *arguments, STOP, STEPS, None)
    losses = [sum(r[0][i] for r in whole) for i in range(STEPS)]
    resumed = [sum(r[0][i] for r in rest) for i in range(STEPS - STOP)]
    if before == after:
        assert resumed == losses[STOP:]
        for (_, weights), (_, again) in zip(whole, rest, strict=True):
            assert {n for n in weights if not torch.equal(weights[n], again[n])} == set()
    else:
        assert resumed == pytest.approx(losses[STOP:], rel=1e-5)
    if dtype == torch.float32:
        assert losses == pytest.approx(exact_run(model, samples, BATCH, STEPS, SETTINGS), rel=1e-4)


def _train(
    layout: ParallelLayout,
    config: Any,
    weights: Any,
    samples: Any,
    dtype: torch.dtype,
    root: Path,
    first: int,
    stop: int,
    save_at: int | None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    built = build(config, layout.resolve(), dtype=dtype)
    load_reference(built, weights)
    wrap_for_training(built)
    updates = make_optimizer(built, SETTINGS, STEPS)
    checkpoints = Checkpoints(built, updates, root, keep=2, background=True, adapters=False)
    identity = {"job": "sft"}
    if first:
        found = newest(root, identity, print)
        assert found is not None and found[1].step == first
        checkpoints.load(found[0])
    losses = []
    for step in range(first, stop):
        losses.append(train_step(built, updates, samples[step * BATCH : (step + 1) * BATCH], step))
        if step + 1 == save_at:
            checkpoints.save(Saved(step + 1, identity))  # written while the next steps change the weights
    checkpoints.wait()
    return losses, {n: p.detach().clone() for n, p in live_parameters(built).items()}
