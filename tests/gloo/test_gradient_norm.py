"""A gradient that is not finite is heard of on every rank, whichever component has it."""

import math
from typing import Any

import pytest
import torch

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import build
from mimo_jobs.training.batches import Shares
from mimo_jobs.training.config import Optimizer
from mimo_jobs.training.optimizer import make_optimizer
from mimo_jobs.training.step import run_step, trained_components, wrap_for_training
from mimo_jobs.training.stopwatch import Stopwatch
from tests.gloo.batches import tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import load_reference
from tests.gloo.training import microbatches_of, samples_of_a_run, table_of

pytestmark = pytest.mark.gloo

LAYOUTS = {
    "disjoint": ParallelLayout(Layout(), Layout(rank_offset=1), 2),
    "images first": ParallelLayout(Layout(rank_offset=1), Layout(), 2),
    "colocated": ParallelLayout(Layout(tp=2), Layout(dp=2), 2),
}


@pytest.mark.parametrize("component", ["language", "images"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_makes_the_norm_infinite_everywhere(
    layout: str, component: str, value: float
) -> None:
    config, model = tiny()
    norms = run_ranks(2, _norm_with, LAYOUTS[layout], config, model.state_dict(), component, value)
    assert norms == [math.inf] * 2


def _norm_with(layout: ParallelLayout, config: Any, weights: Any, component: str, value: float) -> float:
    built = build(config, layout.resolve(), dtype=torch.float32)
    load_reference(built, weights)
    wrap_for_training(built)
    updates = make_optimizer(built, Optimizer(lr=1e-3), 2)
    samples = samples_of_a_run(config, 2)
    table = table_of(samples, [[0], [1]])
    shares = Shares(1, layout.resolve().components["images"].dp, 2, 1)
    run_step(built, microbatches_of(built, samples, table, shares), table.total(table.loss_tokens), Stopwatch())
    if component in trained_components(built):
        parameter = next(trained_components(built)[component].parameters())
        parameter.main_grad.view(-1)[0] = value  # pyright: ignore[reportAttributeAccessIssue]
    return updates.apply().item()
