"""Logits in fp32 equal transformers', whatever the layout."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import build
from mimo_jobs.modeling.forward import forward_logits, mrope_position_ids
from tests.gloo.batches import SAME_SIZE, VARIED, Batch, hf_logits, image_batch, text_batch, tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import load_reference

pytestmark = pytest.mark.gloo

TOLERANCE = 5e-5  # measured 2e-5 at a scale of 4

# name: world size, language, images, model sizes, image sizes, sequence parallel
SCENARIOS: dict[str, tuple[int, Layout, Layout, dict[str, Any], tuple, bool]] = {
    "one rank": (1, Layout(), Layout(), {}, VARIED, False),
    "colocated tp2, tied, vocabulary not divisible": (
        2, Layout(tp=2), Layout(tp=2), dict(tied=True, vocab_size=321), VARIED, False,
    ),
    "colocated tp2 with sequence parallel, images dp2": (2, Layout(tp=2), Layout(dp=2), {}, SAME_SIZE, True),
    "colocated tp4 with two ranks a kv group": (
        4, Layout(tp=4), Layout(tp=4), dict(key_heads=4, values_per_key=1, vocab_size=322), VARIED, False,
    ),
    # Colocated with different dp: megatron-core hands on equal numbers of tokens a row.
    "colocated dp2, images tp2": (2, Layout(dp=2), Layout(tp=2), {}, SAME_SIZE, False),
    "uneven pp2, 5 layers": (3, Layout(pp=2), Layout(rank_offset=2), dict(layers=5, vocab_size=321), VARIED, False),
    "uneven pp3, tied": (4, Layout(pp=3), Layout(rank_offset=3), dict(layers=5, tied=True), VARIED, False),
    "disjoint tp2 with sequence parallel, images tp2 first, more ranks than kv groups": (
        4, Layout(tp=2, rank_offset=2), Layout(tp=2, rank_offset=0),
        dict(kv_heads=1, values_per_key=1, vocab_size=321), VARIED, True,
    ),
    "disjoint, images to dp2": (3, Layout(dp=2), Layout(rank_offset=2), dict(values_per_key=3), VARIED, False),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_logits_equal_transformers(name: str) -> None:
    world_size, language, images, sizes, grids, sequence_parallel = SCENARIOS[name]
    config, model = tiny(**sizes)
    batches = [text_batch(config), image_batch(config, grids)]
    with torch.no_grad():
        expected = [hf_logits(model, batch) for batch in batches]
    layout = ParallelLayout(language, images, world_size)
    results = run_ranks(
        world_size, _differences, config, model.state_dict(), layout, sequence_parallel, batches, expected
    )
    differences = [found for found in results if found is not None]
    last_stage = world_size // language.pp if layout.resolve().colocated else language.tp * (language.dp or 1)
    assert len(differences) == last_stage
    assert max(max(found) for found in differences) < TOLERANCE, differences


def _differences(
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    layout: ParallelLayout,
    sequence_parallel: bool,
    batches: list[Batch],
    expected: list[torch.Tensor],
) -> list[float] | None:
    """On one rank: largest difference for each batch, or None where there are no logits."""
    built = build(config, layout.resolve(), sequence_parallel=sequence_parallel)
    load_reference(built, weights)
    found = []
    for batch, logits in zip(batches, expected, strict=True):
        positions = mrope_position_ids(built.hf, batch.input_ids, batch.grid_thw)
        ours = forward_logits(built, batch.input_ids, positions, batch.pixel_values, batch.grid_thw)
        if ours is not None:
            assert ours.shape == logits.shape
            found.append((ours - logits).abs().max().item())
    return found or None


def test_bf16_is_as_near_to_fp32_as_transformers_bf16() -> None:
    config, model = tiny()
    batch = image_batch(config, VARIED)
    bf16 = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        exact = hf_logits(model, batch)
        theirs = hf_logits(bf16, replace(batch, pixel_values=batch.pixel_values.bfloat16())).float()
    for ours in run_ranks(2, _bf16_logits, config, model.state_dict(), batch):
        assert _rms(ours - exact) < 1.3 * _rms(theirs - exact)


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _bf16_logits(config: dict[str, Any], weights: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    layout = ParallelLayout(Layout(tp=2), Layout(tp=2), 2).resolve()
    built = build(config, layout, dtype=torch.bfloat16, float32_parameters=("A_log", "dt_bias", "norm.weight"))
    load_reference(built, weights)
    positions = mrope_position_ids(built.hf, batch.input_ids, batch.grid_thw)
    logits = forward_logits(built, batch.input_ids, positions, batch.pixel_values, batch.grid_thw)
    assert logits is not None and logits.dtype == torch.bfloat16
    return logits.float()
