"""Loss, every gradient and the gradient's norm equal transformers', in every class of layout."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling import linear
from mimo_jobs.modeling.build import BuiltModel, build
from mimo_jobs.training.batches import Shares
from mimo_jobs.training.config import Optimizer
from mimo_jobs.training.optimizer import make_optimizer
from mimo_jobs.training.run import RECOMPUTE
from mimo_jobs.training.step import component_module, run_step, wrap_for_training
from mimo_jobs.training.stopwatch import Stopwatch
from tests.gloo.batches import tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import live_parameters, load_reference, reference_parameters
from tests.gloo.training import exact, microbatches_of, samples_of_a_run, shares_of, table_of

pytestmark = pytest.mark.gloo

TOLERANCE, CANCELLING, CANCELLING_TOLERANCE = 5e-5, ("A_log", "dt_bias"), 5e-4  # as in test_gradients.py

# name -> layout, samples of a row's replica, options
LAYOUTS: dict[str, tuple[ParallelLayout, int, dict[str, Any]]] = {
    "one rank": (ParallelLayout(Layout(), Layout(), 1), 2, {}),
    "colocated, language tp2, images dp2 (fan-in)": (ParallelLayout(Layout(tp=2), Layout(dp=2), 2), 2, {}),
    "colocated, language dp2, images tp2 (fan-out)": (ParallelLayout(Layout(dp=2), Layout(tp=2), 2), 2, {}),
    "colocated, both dp2": (ParallelLayout(Layout(dp=2), Layout(dp=2), 2), 2, {}),
    "colocated tp2 with sequence parallel": (ParallelLayout(Layout(tp=2), Layout(tp=2), 2), 2, dict(sp=True)),
    "colocated tp2, dp2 (fan-in), several samples a row": (ParallelLayout(Layout(tp=2), Layout(dp=2), 2), 4, dict(sp=True)),
    "disjoint, one each": (ParallelLayout(Layout(), Layout(), 2), 2, {}),
    "disjoint, language tp2, images dp2 (fan-in)": (ParallelLayout(Layout(tp=2), Layout(dp=2, rank_offset=2), 4), 2, {}),
    "disjoint, language dp2, images dp1 (fan-out)": (ParallelLayout(Layout(dp=2), Layout(rank_offset=2), 3), 2, {}),
    "disjoint, language pp2, images dp2, tied": (ParallelLayout(Layout(pp=2), Layout(dp=2, rank_offset=2), 4), 2, dict(tied=True)),
    "disjoint, language pp2 dp2, tied": (ParallelLayout(Layout(pp=2, dp=2), Layout(rank_offset=4), 5), 2, dict(tied=True)),
    "colocated, language tp2 dp2, images dp4": (ParallelLayout(Layout(tp=2, dp=2), Layout(dp=4), 4), 2, dict(sp=True)),
    "disjoint, language tp2 pp2, sequence parallel": (ParallelLayout(Layout(tp=2, pp=2), Layout(rank_offset=4), 5), 2, dict(sp=True)),
    "disjoint, images first": (ParallelLayout(Layout(tp=2, rank_offset=1), Layout(dp=1, rank_offset=0), 3), 2, {}),
    "disjoint, pp2, several samples a row": (ParallelLayout(Layout(pp=2), Layout(rank_offset=2), 3), 3, {}),
    "disjoint, text only": (ParallelLayout(Layout(tp=2), Layout(dp=2, rank_offset=2), 4), 2, dict(text_only=True)),
    "colocated, text only": (ParallelLayout(Layout(tp=2), Layout(dp=2), 2), 2, dict(text_only=True)),
    "disjoint, recomputation": (ParallelLayout(Layout(), Layout(), 2), 2, dict(recompute="full")),
    "colocated tp2, recomputation of the MLPs": (ParallelLayout(Layout(tp=2), Layout(tp=2), 2), 2, dict(recompute="selective")),
    "one rank, added in place": (ParallelLayout(Layout(), Layout(), 1), 3, dict(in_place=True)),
    "colocated, both dp2, added in place": (ParallelLayout(Layout(dp=2), Layout(dp=2), 2), 2, dict(in_place=True, recompute="full")),
    "disjoint, pp2, added in place": (ParallelLayout(Layout(pp=2), Layout(rank_offset=2), 3), 3, dict(in_place=True, recompute="selective")),
    "disjoint, images frozen, added in place": (ParallelLayout(Layout(), Layout(), 2), 2, dict(in_place=True, frozen="images")),
    "colocated, images frozen": (ParallelLayout(Layout(tp=2), Layout(dp=2), 2), 2, dict(frozen="images")),
    "disjoint, images frozen": (ParallelLayout(Layout(), Layout(), 2), 2, dict(frozen="images")),
    "disjoint, language frozen": (ParallelLayout(Layout(pp=2), Layout(rank_offset=2), 3), 2, dict(frozen="language")),
}  # fmt: skip
MICROBATCHES = 2


@dataclass(frozen=True)
class Measured:
    """Relative errors of a step: of its loss, of the gradient's norm (the worst rank's), of each parameter's gradient.

    Attributes:
        stray: parameters whose gradient should be zero and is not.
    """

    loss_error: float
    norm_error: float
    errors: dict[str, float]
    stray: set[str]


@pytest.mark.parametrize("name", LAYOUTS)
def test_step_equals_transformers(name: str) -> None:
    measured = measure(name)
    assert measured.loss_error < 2e-6
    assert measured.norm_error < 3e-5
    bounds = {n: CANCELLING_TOLERANCE if n.endswith(CANCELLING) else TOLERANCE for n in measured.errors}
    assert {n: e for n, e in measured.errors.items() if not e < bounds[n]} == {}
    assert measured.stray == set()


def measure(name: str) -> Measured:
    """One step in a layout, against transformers in fp64."""
    layout, per_replica, options = LAYOUTS[name]
    resolved = layout.resolve()
    config, model = tiny(tied=options.get("tied", False))
    shares = shares_of(resolved, MICROBATCHES)
    count = per_replica * shares.language * MICROBATCHES
    samples = samples_of_a_run(config, count, text_only=options.get("text_only", False))
    loss, gradients, _ = exact(model, samples)
    results = run_ranks(
        resolved.world_size, _on_rank, layout, config, model.state_dict(), gradients, samples, shares, options
    )
    loss_error = abs(sum(part for part, _, _ in results) / loss - 1)
    frozen = options.get("frozen")
    kept = [g for n, g in gradients.items() if frozen is None or ("visual" in n) != (frozen == "images")]
    norm = torch.sqrt(sum(g.square().sum() for g in kept)).item()  # pyright: ignore
    # Relative to the whole tensor: alone, a rank's two numbers of A_log may all but cancel.
    summed: dict[str, tuple[float, float]] = {}
    for _, squares, _ in results:
        for n, (e, w) in squares.items():
            before = summed.get(n, (0.0, 0.0))
            summed[n] = (before[0] + e, before[1] + w)
    errors = {n: (e / w) ** 0.5 for n, (e, w) in summed.items() if w}
    stray = {n for n, (e, w) in summed.items() if not w and e}
    return Measured(loss_error, max(abs(found / norm - 1) for *_, found in results), errors, stray)


def _on_rank(
    layout: ParallelLayout,
    config: Any,
    weights: Any,
    gradients: Any,
    samples: Any,
    shares: Shares,
    options: dict[str, Any],
) -> tuple[float, dict[str, tuple[float, float]], float]:
    """This rank's part of the loss, parameter -> squared error and squared norm of its shard's gradient, total norm."""
    if options.get("in_place"):
        linear.LARGE = 0
    built = _built(layout, config, weights, options, sharded=False)
    rows = _rows(len(samples), shares)
    table = table_of(samples, rows)
    made = microbatches_of(built, samples, table, shares)
    total = table.total(table.loss_tokens)
    loss = run_step(built, made, total, Stopwatch()).item() / total
    wanted, squares, added = reference_parameters(built, gradients), {}, []
    for name, parameter in live_parameters(built).items():
        if parameter.requires_grad:
            added.append(parameter.grad_added_to_main_grad)  # pyright: ignore
            gradient = parameter.main_grad  # pyright: ignore
            squares[name] = ((gradient - wanted[name]).square().sum().item(), wanted[name].square().sum().item())
    assert any(added) == bool(options.get("in_place") and added)
    norm = _sharded_norm(layout, config, weights, options, samples, table, shares, total)
    return loss, squares, norm


def _built(layout: ParallelLayout, config: Any, weights: Any, options: dict[str, Any], *, sharded: bool) -> BuiltModel:
    built = build(
        config,
        layout.resolve(),
        sequence_parallel=options.get("sp", False),
        overrides=dict.fromkeys(("language", "images"), RECOMPUTE[options.get("recompute", "none")]),
    )
    load_reference(built, weights)
    if (frozen := options.get("frozen")) in built.groups:
        component_module(built, str(frozen)).requires_grad_(False)
    wrap_for_training(built, sharded=sharded)
    return built


def _rows(count: int, shares: Shares) -> list[list[int]]:
    """One sample a row, or several where there are more samples."""
    rows = shares.global_batch_size
    return [list(range(r * count // rows, (r + 1) * count // rows)) for r in range(rows)]


def _sharded_norm(
    layout: Any, config: Any, weights: Any, options: Any, samples: Any, table: Any, shares: Any, total: int
) -> float:
    """The same with the distributed optimizer's sharded gradients."""
    built = _built(layout, config, weights, options, sharded=True)
    updates = make_optimizer(built, Optimizer(), 10)
    made = microbatches_of(built, samples, table, shares)
    run_step(built, made, total, Stopwatch())
    norm = updates.apply()
    dist.barrier()
    return norm.item()
