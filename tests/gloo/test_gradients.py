"""Every parameter's gradient equals transformers', also of replicated parameters that work on tp-local heads."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from mimo_jobs.layout import LANGUAGE, ParallelLayout
from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.modeling.build import ENCODER, IMAGES, build
from mimo_jobs.modeling.forward import mrope_position_ids
from mimo_jobs.modeling.loss import Targets
from tests.gloo.batches import VARIED, Batch, hf_logits, image_batch, tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import live_parameters, load_reference, reference_parameters

pytestmark = pytest.mark.gloo

TOLERANCE = 5e-5  # measured 1.5e-5, against transformers in fp64
# Sums with heavy cancellation. Over four seeds, A_log of transformers in fp32 is 1e-6 to 6e-5 off its own fp64, ours
# 3e-6 to 1.3e-4, at tp=1 as at tp=2.
CANCELLING, CANCELLING_TOLERANCE = ("A_log", "dt_bias"), 3e-4


@pytest.mark.parametrize(
    ("sequence_parallel", "sizes"),
    [(False, dict(tied=True)), (True, dict(values_per_key=1)), (False, dict(kv_heads=1))],
    ids=["tp2, tied", "tp2 with sequence parallel", "tp2, more ranks than kv groups"],
)
def test_gradients_equal_transformers(sequence_parallel: bool, sizes: dict[str, Any]) -> None:
    config, model = tiny(**sizes)
    batch = image_batch(config, VARIED, seq=44)
    loss, gradients = _exact_gradients(model, batch)
    results = run_ranks(2, _errors, config, model.state_dict(), gradients, sequence_parallel, batch)
    assert [ours for _, ours in results] == pytest.approx([loss, loss], rel=1e-6)
    # Relative to the whole tensor: alone, a rank's two numbers of A_log may all but cancel.
    relative = {}
    for name in results[0][0]:
        error, norm = (sum(squares[name][i] for squares, _ in results) ** 0.5 for i in (0, 1))
        relative[name] = error / norm
    bounds = {n: CANCELLING_TOLERANCE if n.endswith(CANCELLING) else TOLERANCE for n in relative}
    assert {name: error for name, error in relative.items() if not error < bounds[name]} == {}
    assert any("out_norm" in name for name in relative) and any("q_layernorm" in name for name in relative)


def _exact_gradients(model: torch.nn.Module, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of transformers in fp64."""
    exact = copy.deepcopy(model).double()
    assert batch.pixel_values is not None
    logits = hf_logits(exact, replace(batch, pixel_values=batch.pixel_values.double()))
    loss = F.cross_entropy(logits.flatten(0, 1), _labels(batch).flatten())
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in exact.named_parameters()}


def _labels(batch: Batch) -> torch.Tensor:
    return batch.input_ids.roll(-1, 1)


def _errors(
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    gradients: dict[str, torch.Tensor],
    sequence_parallel: bool,
    batch: Batch,
) -> tuple[dict[str, tuple[float, float]], float]:
    """On one rank: parameter to ``|ours - theirs|**2`` and ``|theirs|**2`` of its shard, and the loss."""
    layout = ParallelLayout(Layout(tp=2), Layout(tp=2), 2).resolve()
    built = build(config, layout, sequence_parallel=sequence_parallel)
    load_reference(built, weights)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
    model, groups, configs = built.model, built.groups, built.configs
    model.language_model = language = DistributedDataParallel(
        configs[LANGUAGE], ddp, model.language_model, pg_collection=groups[LANGUAGE]
    )
    model.modality_submodules[IMAGES] = images = DistributedDataParallel(
        configs[IMAGES], ddp, model.modality_submodules[IMAGES], pg_collection=groups[IMAGES]
    )
    total, _ = model(
        input_ids=batch.input_ids,
        position_ids=mrope_position_ids(built.hf, batch.input_ids, batch.grid_thw),
        targets=Targets.of(_labels(batch)),
        modality_inputs={IMAGES: {ENCODER: dict(pixel_values=batch.pixel_values, grid_thw=batch.grid_thw)}},
    )
    loss = total / batch.input_ids.numel()
    loss.backward()
    finalize_model_grads([language], None, groups[LANGUAGE], force_all_reduce=True)
    finalize_model_grads([images], None, groups[IMAGES], force_all_reduce=True)
    wanted = reference_parameters(built, gradients)
    squares = {
        name: ((parameter.main_grad - wanted[name]).square().sum().item(), wanted[name].square().sum().item())
        for name, parameter in live_parameters(built).items()
    }
    return squares, loss.item()
