"""Loss curves of a run in any layout, and of a transformers + PyTorch loop over the same batches."""

from typing import Any

import torch

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import build
from mimo_jobs.training.config import Optimizer
from mimo_jobs.training.optimizer import make_optimizer
from mimo_jobs.training.step import wrap_for_training
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import load_reference
from tests.gloo.training import train_step

LAYOUTS = {
    "one rank": ParallelLayout(Layout(), Layout(), 1),
    "colocated, language tp2, images dp2": ParallelLayout(Layout(tp=2), Layout(dp=2), 2),
    "disjoint, language pp2 | images": ParallelLayout(Layout(pp=2), Layout(rank_offset=2), 3),
}


def curve(
    layout: ParallelLayout, config: Any, weights: Any, samples: Any, batch: int, steps: int, settings: Optimizer
) -> list[float]:
    """Losses of ``steps`` steps in fp32, which begin with ``weights`` and go over the samples again and again."""
    ranks = run_ranks(
        layout.resolve().world_size, _losses, layout, config, weights, samples, batch, steps, settings, timeout_s=600
    )
    return [sum(r[i] for r in ranks) for i in range(steps)]


def _losses(
    layout: ParallelLayout, config: Any, weights: Any, samples: Any, batch: int, steps: int, settings: Optimizer
) -> list[float]:
    built = build(config, layout.resolve(), dtype=torch.float32)
    load_reference(built, weights)
    wrap_for_training(built)
    updates = make_optimizer(built, settings, steps)
    return [train_step(built, updates, batch_of(samples, batch, step), step) for step in range(steps)]


def batch_of(samples: Any, batch: int, step: int) -> Any:
    """The samples of a step: one epoch after the other, in the same order."""
    first = step * batch % len(samples)
    return samples[first : first + batch]


def largest_difference(curve: list[float], other: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True))
