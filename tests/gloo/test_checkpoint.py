"""A model saved in one layout is bit-equal when loaded in another; pieces are views that cover every parameter once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from mimo_jobs.checkpoint.model_io import load_model, model_tensors, save_model
from mimo_jobs.errors import UserError
from mimo_jobs.layout import LANGUAGE, ParallelLayout
from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.modeling.build import IMAGES, BuiltModel, build
from tests.gloo.batches import tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import live_parameters, load_reference, reference_parameters

pytestmark = pytest.mark.gloo

ONE_RANK = ParallelLayout(world_size=1)
COLOCATED_TP2 = ParallelLayout(Layout(tp=2), Layout(tp=2), 2)
COLOCATED_DP2 = ParallelLayout(Layout(dp=2), Layout(dp=2), 2)
UNEVEN_PP2 = ParallelLayout(Layout(pp=2), Layout(rank_offset=2))
DISJOINT_TP2 = ParallelLayout(Layout(tp=2, rank_offset=2), Layout(tp=2, rank_offset=0))


@pytest.mark.parametrize(
    ("tied", "saved", "loaded"),
    [
        (False, COLOCATED_TP2, [UNEVEN_PP2, ONE_RANK]),
        (False, ONE_RANK, [DISJOINT_TP2, COLOCATED_DP2]),
        (True, UNEVEN_PP2, [COLOCATED_TP2, UNEVEN_PP2]),
    ],
    ids=["tp2 to pp2 and to one rank", "one rank to disjoint tp2 and to dp2", "tied pp2 to tp2 and to itself"],
)
def test_parameters_survive_a_change_of_layout(
    tmp_path: Path, tied: bool, saved: ParallelLayout, loaded: list[ParallelLayout]
) -> None:
    config, model = tiny(layers=5, tied=tied, vocab_size=321)
    weights = model.state_dict()
    run_ranks(saved.resolve().world_size, _save, config, weights, saved, tmp_path)
    for layout in loaded:
        run_ranks(layout.resolve().world_size, _load_and_compare, config, weights, layout, tmp_path)
    other, _ = tiny(layers=4, tied=False, vocab_size=330)
    message = run_ranks(1, _load_error, other, ONE_RANK, tmp_path)[0]
    assert "unexpected language_model.decoder.layers.4.input_layernorm.weight" in message
    assert "language_model.embedding.word_embeddings.weight has shape [32" in message
    assert ("missing language_model.output_layer.weight" in message) == tied


@pytest.mark.parametrize("layout", [COLOCATED_TP2, UNEVEN_PP2], ids=["tp2", "pp2"])
def test_pieces_are_views_that_cover_every_parameter_once(layout: ParallelLayout) -> None:
    config, model = tiny(layers=5, vocab_size=321)
    covered = run_ranks(layout.resolve().world_size, _fill_pieces, config, model.state_dict(), layout)
    # Over all ranks, the pieces that are written tile every global tensor.
    shapes, elements = {}, {}
    for rank in covered:
        for key, shape, size in rank:
            assert shapes.setdefault(key, shape) == shape
            elements[key] = elements.get(key, 0) + size
    assert elements == {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    assert not [key for key in shapes if "module." in key.replace("language_model.", "") or "_extra_state" in key]


def test_parameters_kept_in_float32_survive_in_a_bf16_model(tmp_path: Path) -> None:
    config, model = tiny()
    run_ranks(2, _mixed_precision, config, model.state_dict(), tmp_path)


def _save(config: dict[str, Any], weights: dict[str, torch.Tensor], layout: ParallelLayout, directory: Path) -> None:
    built = build(config, layout.resolve())
    load_reference(built, weights)
    _wrap(built)
    save_model(built, directory)


def _load_and_compare(
    config: dict[str, Any], weights: dict[str, torch.Tensor], layout: ParallelLayout, directory: Path
) -> None:
    built = build(config, layout.resolve())
    _scramble(built)
    load_model(built, directory)
    _assert_bit_equal(built, reference_parameters(built, weights))


def _load_error(config: dict[str, Any], layout: ParallelLayout, directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(build(config, layout.resolve()), directory)
    return str(caught.value)


def _fill_pieces(
    config: dict[str, Any], weights: dict[str, torch.Tensor], layout: ParallelLayout
) -> list[tuple[str, tuple[int, ...], int]]:
    built = build(config, layout.resolve())
    _wrap(built)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.zero_()
        for piece in model_tensors(built):
            piece.data.add_(1)
    for name, parameter in live_parameters(built).items():
        assert (parameter == 1).all(), name
    return [(p.key, p.global_shape, p.data.numel()) for p in model_tensors(built) if p.writes]


def _mixed_precision(config: dict[str, Any], weights: dict[str, torch.Tensor], directory: Path) -> None:
    float32 = ("self_attention.A_log", "out_norm.weight")
    built = build(config, COLOCATED_TP2.resolve(), dtype=torch.bfloat16, float32_parameters=float32)
    load_reference(built, weights)
    save_model(built, directory)
    _scramble(built)
    load_model(built, directory)
    live = live_parameters(built)
    assert {p.dtype for n, p in live.items() if n.endswith(float32)} == {torch.float32}
    assert {p.dtype for n, p in live.items() if not n.endswith(float32)} == {torch.bfloat16}
    wanted = reference_parameters(built, weights)
    _assert_bit_equal(built, {name: value.to(live[name].dtype) for name, value in wanted.items()})


def _wrap(built: BuiltModel) -> None:
    """Wrap as training does: keys must not show it."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
    if LANGUAGE in built.groups:
        built.model.language_model = DistributedDataParallel(
            config=built.configs[LANGUAGE],
            ddp_config=ddp,
            module=built.model.language_model,
            pg_collection=built.groups[LANGUAGE],
        )
    if IMAGES in built.groups:
        built.model.modality_submodules[IMAGES] = DistributedDataParallel(
            config=built.configs[IMAGES],
            ddp_config=ddp,
            module=built.model.modality_submodules[IMAGES],
            pg_collection=built.groups[IMAGES],
        )


def _scramble(built: BuiltModel) -> None:
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.fill_(float("nan"))


def _assert_bit_equal(built: BuiltModel, wanted: dict[str, torch.Tensor]) -> None:
    for name, parameter in live_parameters(built).items():
        assert parameter.dtype == wanted[name].dtype, name
        assert torch.equal(parameter.detach(), wanted[name]), name
