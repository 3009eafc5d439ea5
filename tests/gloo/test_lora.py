"""Adapters at every tensor parallelism: each gradient equals that of PEFT on transformers, in fp64."""

from typing import Any

import pytest
import torch

from mimo_jobs.families import family_of
from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import build
from mimo_jobs.modeling.lora import add_adapters
from mimo_jobs.training.config import Lora
from mimo_jobs.weights.adapters import targeted
from tests.gloo.adapters import (
    adapter_values,
    exact_gradients,
    gradients,
    live_adapters,
    load_adapters,
    peft_model,
    reference_adapters,
    wrap,
)
from tests.gloo.batches import VARIED, Batch, image_batch, tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import load_reference

pytestmark = pytest.mark.gloo

TOLERANCE = 5e-5
ALL = "language,images"
FOUR_KEYS = dict(key_heads=4, values_per_key=1, vocab_size=324)
MANY = dict(kv_heads=1, values_per_key=1)

# name: layout, sequence parallel, sizes of the model, targets
SCENARIOS: dict[str, tuple[ParallelLayout, bool, dict[str, Any], str]] = {
    "one rank": (ParallelLayout(world_size=1), False, {}, ALL),
    "tp2": (ParallelLayout(Layout(tp=2), Layout(tp=2), 2), False, {}, ALL),
    "tp2 with sequence parallel": (ParallelLayout(Layout(tp=2), Layout(tp=2), 2), True, {}, ALL),
    "tp4, two ranks a kv group": (ParallelLayout(Layout(tp=4), Layout(tp=4), 4), False, FOUR_KEYS, ALL),
    "tp4 with sequence parallel, some projections of fused layers": (
        ParallelLayout(Layout(tp=4), Layout(tp=4), 4), True, FOUR_KEYS, "k_proj,in_proj_b,up_proj,attn.qkv",
    ),
    "tp2, more ranks than kv groups, some projections": (
        ParallelLayout(Layout(tp=2), Layout(tp=2), 2), False, MANY, "q_proj,v_proj,in_proj_qkv,in_proj_a,down_proj",
    ),
    "pp2 beside images": (ParallelLayout(Layout(pp=2), Layout()), False, dict(layers=5, tied=True), ALL),
    "pp2 beside frozen images": (ParallelLayout(Layout(pp=2), Layout()), False, {}, "down_proj,out_proj,o_proj"),
    "images tp2 beside tp2 with sequence parallel": (
        ParallelLayout(Layout(tp=2, rank_offset=2), Layout(tp=2, rank_offset=0)), True, {}, ALL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_gradients_equal_peft(name: str) -> None:
    layout, sequence_parallel, sizes, targets = SCENARIOS[name]
    config, model = tiny(**sizes)
    modules = targeted(family_of(config).weight_map(config), targets)
    lora = Lora(rank=4, alpha=6.0, targets=targets, rslora=name == "tp2")
    adapted = peft_model(model, modules, r=4, lora_alpha=6, use_rslora=lora.rslora)
    batch = image_batch(config, VARIED, seq=44)
    loss, wanted = exact_gradients(adapted, batch)
    results = run_ranks(
        layout.resolve().world_size, _errors, config, model.state_dict(), adapter_values(adapted), wanted, layout, lora,
        sequence_parallel, batch,
    )  # fmt: skip
    losses = [ours for _, ours in results if ours is not None]
    assert losses == pytest.approx([loss] * len(losses), rel=1e-6) and losses
    relative: dict[str, float] = {}
    for parameter in {p for squares, _ in results for p in squares}:
        errors, norms = zip(*(squares[parameter] for squares, _ in results if parameter in squares), strict=True)
        relative[parameter] = (sum(errors) / sum(norms)) ** 0.5
    assert {n: e for n, e in relative.items() if not e < TOLERANCE} == {}
    assert len(relative) == len({_layer(m, config) for m in modules}) * 2


def _layer(module: str, config: dict[str, Any]) -> str:
    """A name for the fused layer that a projection is in."""
    fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}
    parent, _, name = module.rpartition(".")
    return f"{parent}.{fused.get(name, 'in_proj' if name.startswith('in_proj') else name)}"


def _errors(
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    layout: ParallelLayout,
    lora: Lora,
    sequence_parallel: bool,
    batch: Batch,
) -> tuple[dict[str, tuple[float, float]], float | None]:
    """On one rank: parameter to ``|ours - theirs|**2`` and ``|theirs|**2`` of its shard, and the loss."""
    built = build(config, layout.resolve(), sequence_parallel=sequence_parallel)
    load_reference(built, weights)  # before: it wants every parameter named
    add_adapters(built, lora)
    load_adapters(built, weights, values, lora.rank)
    loss = gradients(built, wrap(built), batch)
    expected, live = reference_adapters(built, weights, wanted, lora.rank), live_adapters(built)
    trained = {id(p) for p in built.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in live.values()}
    squares = {}
    for name, parameter in live.items():
        error, norm = (parameter.main_grad - expected[name]).square().sum(), expected[name].square().sum()
        squares[name] = (error.item(), norm.item())
    return squares, loss
