"""A training step asks the device for nothing: a number that the host waits for lets the GPU run dry."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import build
from mimo_jobs.training.run import RECOMPUTE
from mimo_jobs.training.step import run_step, wrap_for_training
from mimo_jobs.training.stopwatch import Stopwatch
from tests.gloo.batches import tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import load_reference
from tests.gloo.training import microbatches_of, samples_of_a_run, shares_of, table_of

pytestmark = pytest.mark.gloo
ASKS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)


class Asked(TorchDispatchMode):
    """Notes who takes a number from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in ASKS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "layout", [ParallelLayout(Layout(), Layout(), 1), ParallelLayout(Layout(tp=2), Layout(dp=2), 2)], ids=["one", "two"]
)
def test_a_step_takes_no_number_from_a_tensor(layout: ParallelLayout, recompute: str) -> None:
    config, model = tiny()
    samples = samples_of_a_run(config, 4)
    for found in run_ranks(layout.resolve().world_size, _asked, layout, config, model.state_dict(), samples, recompute):
        assert found == []


def _asked(layout: ParallelLayout, config: Any, weights: Any, samples: Any, recompute: str) -> list[str]:
    overrides = dict.fromkeys(("language", "images"), RECOMPUTE[recompute])
    built = build(config, layout.resolve(), dtype=torch.float32, overrides=overrides)
    load_reference(built, weights)
    wrap_for_training(built)
    table = table_of(samples, [[i] for i in range(len(samples))])
    batch = microbatches_of(built, samples, table, shares_of(built.layout, 2))
    with Asked() as asked:
        run_step(built, batch, table.total(table.loss_tokens), Stopwatch())
    return asked.found
