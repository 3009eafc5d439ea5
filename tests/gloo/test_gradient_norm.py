"""The norm of all gradients: one that is not finite is heard of on every rank, one above the bound scales them all."""

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
    _backward(built, config)
    if component in trained_components(built):
        parameter = next(trained_components(built)[component].parameters())
        parameter.main_grad.view(-1)[0] = value  # pyright: ignore[reportAttributeAccessIssue]
    return updates.apply().item()


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_gradients_that_the_norm_leaves_out_are_scaled_by_it(state: Any) -> None:
    """Of parameters that tensor-parallel ranks hold in common the norm takes one rank's; where nothing else trains, the others have none."""
    config, model = tiny()
    whole, *others = run_ranks(2, _scaled, config, model.state_dict(), state)
    assert whole["norm"] > 100 * CLIP and whole["counted"] > 0 and others[0]["counted"] == 0
    for rank in (whole, *others):
        assert rank["norm"] == whole["norm"]
        assert torch.equal(rank["scaled"], whole["scaled"])
    assert whole["scaled"].norm().item() == pytest.approx(CLIP, rel=1e-2 if state == "bf16" else 1e-4)


CLIP = 1e-3


def _scaled(config: Any, weights: Any, state: Any) -> dict[str, Any]:
    """On this rank: the norm, how many gradients it was made of, and all of them as the optimizer took them."""
    dtype = torch.bfloat16 if state == "bf16" else torch.float32
    built = build(config, ParallelLayout(Layout(tp=2), Layout(tp=2), 2).resolve(), dtype=dtype)
    load_reference(built, weights)
    for name, parameter in built.model.named_parameters():
        parameter.requires_grad = "images" in name and not getattr(parameter, "tensor_model_parallel", False)
    wrap_for_training(built, wide_gradients=state == "fp32")
    updates = make_optimizer(built, Optimizer(lr=1e-3, clip_grad=CLIP, state=state), 2)
    _backward(built, config)
    (one,) = [p for part in updates.optimizer._active_optimizers for p in getattr(part, "chained_optimizers", [part])]
    norm = updates.apply().item()
    scale = getattr(one.optimizer, "scale", None)
    gradients = torch.cat([p.decoupled_grad.float().flatten() for p in one.get_parameters()])
    return {"norm": norm, "counted": len(one.gradients), "scaled": gradients if scale is None else gradients * scale}


def _backward(built: Any, config: Any) -> None:
    samples = samples_of_a_run(config, 2)
    table = table_of(samples, [[0], [1]])
    shares = Shares(1, built.layout.components["images"].dp, 2, 1)
    run_step(built, microbatches_of(built, samples, table, shares), table.total(table.loss_tokens), Stopwatch())
