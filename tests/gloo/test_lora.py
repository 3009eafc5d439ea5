"""Adapters at every tensor parallelism: each gradient equals that of PEFT on transformers, in fp64."""

from typing import Any

import pytest
import torch

from mimo_jobs.errors import UsageError
from mimo_jobs.families import family_of
from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling import lora
from mimo_jobs.modeling.build import build
from mimo_jobs.modeling.lora import add_adapters, seed_dropout
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


DORA = (
    "one rank",
    "tp2 with sequence parallel",
    "tp4, two ranks a kv group",
    "tp2, more ranks than kv groups, some projections",
)


@pytest.mark.parametrize(("name", "dora"), [*((n, False) for n in SCENARIOS), *((n, True) for n in DORA)])
def test_gradients_equal_peft(name: str, dora: bool) -> None:
    layout, sequence_parallel, sizes, targets = SCENARIOS[name]
    config, model = tiny(**sizes)
    modules = targeted(family_of(config).weight_map(config), targets)
    settings = Lora(rank=4, alpha=6.0, targets=targets, rslora=name == "tp2", dora=dora)
    adapted = peft_model(model, modules, r=4, lora_alpha=6, use_rslora=settings.rslora, use_dora=dora)
    batch = image_batch(config, VARIED, seq=44)
    loss, wanted = exact_gradients(adapted, batch)
    results = run_ranks(
        layout.resolve().world_size, _errors, config, model.state_dict(), adapter_values(adapted), wanted, layout, settings,
        sequence_parallel, batch,
    )  # fmt: skip
    losses = [ours for _, ours in results if ours is not None]
    assert losses == pytest.approx([loss] * len(losses), rel=1e-6) and losses
    relative: dict[str, float] = {}
    for parameter in {p for squares, _ in results for p in squares}:
        errors, norms = zip(*(squares[parameter] for squares, _ in results if parameter in squares), strict=True)
        relative[parameter] = (sum(errors) / sum(norms)) ** 0.5
    assert {n: e for n, e in relative.items() if not e < TOLERANCE} == {}
    assert len(relative) == len({_layer(m, config) for m in modules}) * (3 if dora else 2)


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
    settings: Lora,
    sequence_parallel: bool,
    batch: Batch,
) -> tuple[dict[str, tuple[float, float]], float | None]:
    """On one rank: parameter to ``|ours - theirs|**2`` and ``|theirs|**2`` of its shard, and the loss."""
    built = build(config, layout.resolve(), sequence_parallel=sequence_parallel)
    load_reference(built, weights)  # before: it wants every parameter named
    add_adapters(built, settings)
    load_adapters(built, weights, values, settings.rank)
    loss = gradients(built, wrap(built), batch)
    expected, live = reference_adapters(built, weights, wanted, settings.rank), live_adapters(built)
    trained = {id(p) for p in built.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in live.values()}
    squares = {}
    for name, parameter in live.items():
        error, norm = (parameter.main_grad - expected[name]).square().sum(), expected[name].square().sum()
        squares[name] = (error.item(), norm.item())
    return squares, loss


def test_dropout_is_one_mask_where_ranks_hold_copies_and_many_elsewhere() -> None:
    config, model = tiny()
    batch = image_batch(config, VARIED, seq=44)
    first, second = run_ranks(2, _dropped, config, model.state_dict(), batch)
    assert first["losses"] == second["losses"]  # of copies: the ranks saw the same
    plain, one, two, again = first["losses"]
    assert len({plain, one, two}) == 3 and again == one
    assert first["replicated"].keys() == second["replicated"].keys() and first["replicated"]
    for name, gradient in first["replicated"].items():
        torch.testing.assert_close(gradient, second["replicated"][name])
    assert torch.equal(first["whole"], second["whole"]) and not torch.equal(first["cut"], second["cut"])
    assert abs(first["whole"].float().mean().item() - 0.7) < 0.02


def _dropped(config: dict[str, Any], weights: dict[str, torch.Tensor], batch: Batch) -> dict[str, Any]:
    built = build(config, ParallelLayout(Layout(tp=2), Layout(tp=2), 2).resolve())
    load_reference(built, weights)
    add_adapters(built, Lora(rank=4, alpha=8, dropout=0.3, targets=ALL), seed=1)
    with torch.no_grad():
        for parameter in live_adapters(built).values():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1
            )
    wrapped = wrap(built)
    losses = []
    for training, seed in ((False, None), (True, 5), (True, None), (True, 5)):
        built.model.train(training)
        if seed is not None:
            seed_dropout(built, seed)
        losses.append(gradients(built, wrapped, batch))
    marks = {n: p for n, p in live_adapters(built).items() if not getattr(p, "tensor_model_parallel", False)}
    draws = {
        cut: lora._keep(torch.zeros(64, 64), 0.3, lora._stream("language", cut == "cut")) for cut in ("whole", "cut")
    }
    return {"losses": losses, "replicated": {n: p.main_grad for n, p in marks.items()}, **draws}


@pytest.mark.parametrize("targets", [ALL, "up_proj"])
def test_recomputation_repeats_dropout_and_loses_no_gradient(targets: str) -> None:
    """The embedding is frozen, so nothing that enters the first recomputed layer would need a gradient."""
    config, model = tiny()
    batch = image_batch(config, VARIED, seq=44)
    run_ranks(1, _recomputed, config, model.state_dict(), targets, batch)


def _recomputed(config: dict[str, Any], weights: dict[str, torch.Tensor], targets: str, batch: Batch) -> None:
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    found = []
    for overrides in ({}, {"language": recompute, "images": recompute}):
        built = build(config, ParallelLayout(world_size=1).resolve(), overrides=overrides)
        load_reference(built, weights)
        add_adapters(built, Lora(rank=4, alpha=8, dropout=0.3, targets=targets), seed=1)
        built.model.train()
        with torch.no_grad():
            for parameter in live_adapters(built).values():
                parameter.fill_(0.05)
        loss = gradients(built, wrap(built), batch)
        found.append((loss, {n: p.main_grad.clone() for n, p in live_adapters(built).items()}))
    (loss, kept), (same_loss, repeated) = found
    assert loss == pytest.approx(same_loss, rel=1e-6)
    for name, gradient in kept.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(repeated[name], gradient, rtol=1e-4, atol=1e-7)


def test_settings_out_of_bounds_and_stages_without_an_adapter_are_named() -> None:
    config, _ = tiny()
    layout = ParallelLayout(Layout(pp=2), Layout())
    for messages in run_ranks(3, _refusals, config, layout):
        assert messages == [
            "lora.rank=0: expected an integer of at least 1",
            "lora.alpha=0: expected a number above 0",
            "lora.dropout=1: expected a number of at least 0 and below 1",
            "lora.targets='q_proj': stage 0 of layout.language.pp=2 (layers 0 to 1) has none of them; add targets that every "
            "layer has (down_proj), or set a smaller layout.language.pp",
        ]


def _refusals(config: dict[str, Any], layout: ParallelLayout) -> list[str]:
    built = build(config, layout.resolve())
    found = []
    for wrong in (dict(rank=0), dict(alpha=0), dict(dropout=1.0), dict(targets="q_proj")):
        with pytest.raises(UsageError) as caught:
            add_adapters(built, Lora(**wrong))
        found.append(str(caught.value))
    assert all(p.requires_grad for p in built.model.parameters())  # nothing was changed
    return found
