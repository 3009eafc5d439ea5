"""The host runs ahead of the device in a training step: PyTorch tells of every call that waits.

One command: ``python -m pytest tests/gpu``.
"""

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device"), pytest.mark.timeout(540),
]  # fmt: skip


@pytest.fixture
def one_rank():
    torch.compiler.set_stance("force_eager")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.compiler.set_stance("default")
    dist.destroy_process_group()


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_nothing_in_a_step_waits_for_the_device(one_rank: None, state: Any) -> None:
    from mimo_jobs.layout import ComponentLayout, ParallelLayout
    from mimo_jobs.modeling.build import build
    from mimo_jobs.training.batches import Shares
    from mimo_jobs.training.config import Optimizer
    from mimo_jobs.training.optimizer import make_optimizer
    from mimo_jobs.training.step import run_step, wrap_for_training
    from mimo_jobs.training.stopwatch import Stopwatch
    from tests.gloo.batches import tiny
    from tests.gloo.reference_weights import load_reference
    from tests.gloo.training import microbatches_of, samples_of_a_run, table_of

    config, model = tiny()
    samples, one = samples_of_a_run(config, 4), ComponentLayout()
    built = build(config, ParallelLayout(one, one, 1).resolve(), dtype=torch.bfloat16)
    load_reference(built, {n: t.cuda() for n, t in model.state_dict().items()})
    wrap_for_training(built, wide_gradients=state == "fp32")
    updates = make_optimizer(built, Optimizer(lr=1e-4, state=state), 4)
    table = table_of(samples, [[i] for i in range(4)])
    made = microbatches_of(built, samples, table, Shares(1, 1, 2, 2))
    total = table.total(table.loss_tokens)

    def step() -> torch.Tensor:
        batch = [m.pinned().to(torch.device("cuda")) for m in made]
        updates.set_step(0)
        loss = run_step(built, batch, total, Stopwatch())
        return torch.stack([loss, updates.apply()])

    for _ in range(2):  # kernels are compiled and tuned, state is made
        step()
    torch.cuda.set_sync_debug_mode("error")
    found = step()
    torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()
