"""`optimizer.state=bf16`: gradients and moments in 16 bits beside fp32 weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import build
from mimo_jobs.modeling.lora import add_adapters
from mimo_jobs.training.adamw import NarrowAdamW
from mimo_jobs.training.checkpoints import Checkpoints
from mimo_jobs.training.config import Lora, Optimizer
from mimo_jobs.training.optimizer import Updates, make_optimizer
from mimo_jobs.training.saved import Saved, newest
from mimo_jobs.training.step import run_step, wrap_for_training
from mimo_jobs.training.stopwatch import Stopwatch
from tests.gloo.batches import tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import live_parameters, load_reference
from tests.gloo.training import microbatches_of, samples_of_a_run, shares_of, table_of, train_step

SETTINGS: dict[str, Any] = dict(lr=1e-3, weight_decay=0.1, schedule="constant")
ONE, SPREAD = ParallelLayout(Layout(), Layout(), 1), ParallelLayout(Layout(tp=2), Layout(dp=2), 2)
BATCH, STEPS = 4, 6


def test_updates_are_those_of_pytorchs_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(300)
    mine, wanted = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options: dict[str, Any] = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    reference = torch.optim.AdamW([wanted], **options)
    optimizer = NarrowAdamW.instead_of(torch.optim.AdamW([mine], **options))
    optimizer.scale, mine.rounded = torch.tensor(0.25), torch.zeros(300, dtype=torch.bfloat16)  # pyright: ignore[reportAttributeAccessIssue]
    for step in range(20):
        wanted.grad = torch.randn(300) * 10 ** (step % 3)
        mine.decoupled_grad = 4 * wanted.grad  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        reference.step()
        torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=2e-7)
        assert torch.equal(mine.rounded, mine.bfloat16())
    assert optimizer.state[mine]["exp_avg"].dtype == torch.float32


def test_moments_of_16_bits_stay_as_near_as_16_bits_are() -> None:
    torch.manual_seed(0)
    start = torch.randn(1000)
    mine, wanted = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    reference = torch.optim.AdamW([wanted], **options)
    optimizer = NarrowAdamW.instead_of(torch.optim.AdamW([mine], **options))
    for _ in range(100):
        gradient = (torch.randn(1000) + 0.5).bfloat16()
        wanted.grad, mine.decoupled_grad = gradient.float(), gradient  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        reference.step()
    assert optimizer.state[mine]["exp_avg_sq"].dtype == torch.bfloat16
    moved, apart = (wanted - start).norm(), (mine - wanted).norm()
    assert apart < 0.01 * moved


@pytest.mark.gloo
@pytest.mark.parametrize("layouts", [(ONE, SPREAD), (SPREAD, ONE)], ids=["one, then spread", "spread, then one"])
def test_a_run_learns_as_with_fp32_and_goes_on_in_another_layout(
    layouts: tuple[ParallelLayout, ParallelLayout], tmp_path: Path
) -> None:
    config, model = tiny()
    samples = samples_of_a_run(config, BATCH) * STEPS
    weights = model.state_dict()

    def run(layout: ParallelLayout, root: Path, first: int, stop: int, state: str) -> list[float]:
        world = layout.resolve().world_size
        ranks = run_ranks(world, _losses, layout, config, weights, samples, root, first, stop, state)
        return [sum(losses) for losses in zip(*ranks, strict=True)]

    wide = run(ONE, tmp_path / "wide", 0, STEPS, "fp32")
    narrow = run(layouts[0], tmp_path / "narrow", 0, STEPS, "bf16")
    assert narrow == pytest.approx(wide, rel=0.02) and wide[-1] < 0.8 * wide[0]
    assert run(layouts[0], tmp_path / "narrow", STEPS // 2, STEPS, "bf16") == narrow[STEPS // 2 :]
    assert run(layouts[1], tmp_path / "narrow", STEPS // 2, STEPS, "bf16") == pytest.approx(
        narrow[STEPS // 2 :], rel=5e-3
    )
    # The other kind of state takes over what this one wrote.
    assert run(ONE, tmp_path / "narrow", STEPS // 2, STEPS, "fp32") == pytest.approx(narrow[STEPS // 2 :], rel=0.02)


@pytest.mark.gloo
def test_the_norm_counts_each_gradient_once() -> None:
    config, model = tiny()
    samples = samples_of_a_run(config, BATCH)
    norms = {
        (name, state): run_ranks(
            layout.resolve().world_size, _losses, layout, config, model.state_dict(), samples, Path(), 0, 0, state
        )
        for name, layout in (("one", ONE), ("spread", SPREAD))
        for state in ("fp32", "bf16")
    }
    for name, count in (("one", 1), ("spread", 2)):
        wide, narrow = ([norm for (norm,) in norms[name, state]] for state in ("fp32", "bf16"))
        assert wide == [wide[0]] * count and narrow == [narrow[0]] * count
        assert narrow == pytest.approx(wide, rel=1e-4)


@pytest.mark.gloo
@pytest.mark.parametrize("kind", ["A_log in fp32", "all in fp32", "adapters"])
def test_parameters_of_fp32_keep_a_state_of_fp32(kind: str, tmp_path: Path) -> None:
    config, model = tiny()
    samples = samples_of_a_run(config, BATCH) * 4
    for name, layout in (("one", ONE), ("spread", SPREAD)):
        world, root = layout.resolve().world_size, tmp_path / name
        whole = run_ranks(world, _kind, kind, layout, config, model.state_dict(), samples, root, 0)
        again = run_ranks(world, _kind, kind, layout, config, model.state_dict(), samples, root, 2)
        assert again == [losses[2:] for losses in whole]


def _kind(
    kind: str, layout: ParallelLayout, config: Any, weights: Any, samples: Any, root: Path, first: int
) -> list[float]:
    """Losses of four steps, of which the first two may be another run's; adapters and ``A_log`` are of fp32."""
    dtype = torch.float32 if kind == "all in fp32" else torch.bfloat16
    kept = ("self_attention.A_log",) if kind == "A_log in fp32" else ()
    built = build(config, layout.resolve(), dtype=dtype, float32_parameters=kept)
    load_reference(built, weights)
    if kind == "adapters":
        add_adapters(built, Lora(rank=4), 0)
    wrap_for_training(built, wide_gradients=False)
    updates = make_optimizer(built, Optimizer(state="bf16", **SETTINGS), 4)
    checkpoints = Checkpoints(built, updates, root, keep=2, background=False, adapters=kind == "adapters")
    if first:
        found = newest(root, {}, print)
        assert found is not None
        checkpoints.load(found[0])
    losses = []
    for step in range(first, 4):
        losses.append(train_step(built, updates, samples[step * BATCH : (step + 1) * BATCH], step))
        if not first and step == 1:
            checkpoints.save(Saved(2, {}))
    checkpoints.wait()
    assert moments_of(updates) == {torch.float32} | ({torch.bfloat16} if kind == "A_log in fp32" else set())
    return losses


def moments_of(updates: Updates) -> set[torch.dtype]:
    """Dtypes of all moments."""
    found = set()
    for info in updates.optimizer.module_infos.values():
        if info.optimizer is not None:
            for one in getattr(info.optimizer, "chained_optimizers", [info.optimizer]):
                for state in one.optimizer.state.values():
                    found |= {state["exp_avg"].dtype, state["exp_avg_sq"].dtype}
    return found


def _losses(
    layout: ParallelLayout, config: Any, weights: Any, samples: Any, root: Path, first: int, stop: int, state: Any
) -> list[float]:
    built = build(config, layout.resolve(), dtype=torch.bfloat16)
    load_reference(built, weights)
    wrap_for_training(built, wide_gradients=state == "fp32")
    updates = make_optimizer(built, Optimizer(state=state, **SETTINGS), STEPS)
    checkpoints = Checkpoints(built, updates, root, keep=2, background=False, adapters=False)
    if first:
        found = newest(root, {}, print)
        assert found is not None and found[1].step == first
        checkpoints.load(found[0])
    if not stop:
        table, shares = table_of(samples, [[i] for i in range(BATCH)]), shares_of(built.layout, 2)
        run_step(built, microbatches_of(built, samples, table, shares), table.total(table.loss_tokens), Stopwatch())
        return [updates.apply().item()]
    losses = []
    for step in range(first, stop):
        losses.append(train_step(built, updates, samples[step * BATCH : (step + 1) * BATCH], step))
        if not first and step + 1 == STEPS // 2:
            checkpoints.save(Saved(step + 1, {}))
    checkpoints.wait()
    assert moments_of(updates) == {torch.bfloat16 if state == "bf16" else torch.float32}
    narrow = {p.main_grad.dtype for p in live_parameters(built).values() if p.dtype == torch.bfloat16}  # pyright: ignore
    assert narrow == {torch.bfloat16 if state == "bf16" else torch.float32}
    return losses
