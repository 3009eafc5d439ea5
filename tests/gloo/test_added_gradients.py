"""Weight gradients that the product itself adds where they are summed are those that DDP adds, in bf16 too."""

from typing import Any

import pytest
import torch

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling import linear
from mimo_jobs.modeling.build import build
from mimo_jobs.training.batches import Shares
from mimo_jobs.training.step import run_step, wrap_for_training
from mimo_jobs.training.stopwatch import Stopwatch
from tests.gloo.batches import tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import live_parameters, load_reference
from tests.gloo.training import microbatches_of, samples_of_a_run, table_of

pytestmark = pytest.mark.gloo


@pytest.mark.parametrize("wide", [True, False])
def test_gradients_of_bf16_weights_are_those_that_ddp_adds(wide: bool) -> None:
    config, model = tiny()
    for added, errors in run_ranks(2, _errors, config, model.state_dict(), wide):
        assert added > 10
        # Two microbatches: a gradient rounded to bf16 before it is added, or not, is 2^-9 off.
        assert {n: e for n, e in errors.items() if not e < 2e-2} == {}


def _errors(config: Any, weights: Any, wide: bool) -> tuple[int, dict[str, float]]:
    """How many gradients were added in place, and the relative difference of each to the one that was not."""
    found = []
    for large in (1 << 40, 0):
        linear.LARGE = large
        layout = ParallelLayout(Layout(dp=2), Layout(dp=2), 2).resolve()
        built = build(config, layout, dtype=torch.bfloat16)
        load_reference(built, weights)
        wrap_for_training(built, sharded=False, wide_gradients=wide)
        samples = samples_of_a_run(config, 4)
        table = table_of(samples, [[i] for i in range(4)])
        made = microbatches_of(built, samples, table, Shares(2, 2, 1, 2))
        run_step(built, made, table.total(table.loss_tokens), Stopwatch())
        found.append(live_parameters(built))
    before, after = found
    gradients = {n: (before[n].main_grad.float(), after[n].main_grad.float()) for n in after}  # pyright: ignore
    assert not any(p.grad_added_to_main_grad for p in before.values())  # pyright: ignore
    return sum(p.grad_added_to_main_grad for p in after.values()), {  # pyright: ignore
        n: ((one - other).norm() / one.norm().clamp(min=1e-12)).item() for n, (one, other) in gradients.items()
    }
