"""The conversion against an independent mapping and the real MimoModel: same keys, same boxes, same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import save_file

from mimo_jobs.checkpoint.model_io import load_model, model_tensors, save_model
from mimo_jobs.conversion.fill import fill_model
from mimo_jobs.conversion.verify import verify_hf
from mimo_jobs.families import family_of
from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import build
from mimo_jobs.weights import plan
from mimo_jobs.weights.safetensors_io import INDEX_NAME
from tests.conversion_ranks import convert
from tests.gloo.batches import tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import live_parameters, reference_parameters

pytestmark = pytest.mark.gloo

LAYOUTS = {
    "one rank": ParallelLayout(world_size=1),
    "colocated tp2 / dp2": ParallelLayout(Layout(tp=2, rank_offset=0), Layout(dp=2, rank_offset=0)),
    "uneven pp2 | images": ParallelLayout(Layout(pp=2), Layout()),
    "tp2 | tp2, images first": ParallelLayout(Layout(tp=2, rank_offset=2), Layout(tp=2, rank_offset=0)),
}


def as_hf(directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    """Two shards, an index, config.json: what save_pretrained leaves."""
    directory.mkdir()
    names = [n for n in weights if n != "lm_head.weight" or not config["tie_word_embeddings"]]
    weight_map = {}
    for i in (0, 1):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: weights[n].contiguous() for n in names[i::2]}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::2], file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def plain(layout: ParallelLayout) -> dict[str, Any]:
    sizes = layout.resolve().as_layout()
    return {**sizes, "world_size": layout.resolve().world_size}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_model_gets_the_bits_that_an_independent_mapping_gives(tmp_path: Path, name: str, tied: bool) -> None:
    """Both ways in: straight from the HF files, and through a checkpoint imported under another layout."""
    config, model = tiny(layers=5, tied=tied, vocab_size=321)
    weights = {n: t.detach() for n, t in model.state_dict().items()}
    source = as_hf(tmp_path / "hf", config, weights)
    other = LAYOUTS["tp2 | tp2, images first" if name != "tp2 | tp2, images first" else "uneven pp2 | images"]
    convert(tmp_path / "r", "import", plain(other), model=str(source), target=str(tmp_path / "mimo"))
    layout = LAYOUTS[name]
    for way in ("fill", "load"):
        run_ranks(
            layout.resolve().world_size,
            _filled_equals_reference,
            config,
            weights,
            layout,
            way,
            source,
            tmp_path / "mimo",
        )


def _filled_equals_reference(config, weights, layout, way, source: Path, mimo: Path) -> None:
    built = build(config, layout.resolve())
    with torch.no_grad():
        for parameter in live_parameters(built).values():
            parameter.fill_(float("nan"))
    fill_model(built, source) if way == "fill" else load_model(built, mimo)
    for name, expected in reference_parameters(built, weights).items():
        assert torch.equal(live_parameters(built)[name], expected), (way, name)


@pytest.mark.parametrize("name", ["colocated tp2 / dp2", "uneven pp2 | images"])
def test_megatron_core_loads_a_checkpoint_with_its_own_state_dict_alone(tmp_path: Path, name: str) -> None:
    config, model = tiny(layers=5, vocab_size=321)
    weights = {n: t.detach() for n, t in model.state_dict().items()}
    source = as_hf(tmp_path / "hf", config, weights)
    convert(
        tmp_path / "r",
        "import",
        plain(LAYOUTS["tp2 | tp2, images first"]),
        model=str(source),
        target=str(tmp_path / "mimo"),
    )
    run_ranks(LAYOUTS[name].resolve().world_size, _stock_load, config, weights, LAYOUTS[name], tmp_path / "mimo")


def _stock_load(config, weights, layout, mimo: Path) -> None:
    built = build(config, layout.resolve())
    with torch.no_grad():
        for parameter in live_parameters(built).values():
            parameter.zero_()
    loaded = dist_checkpointing.load(built.model.sharded_state_dict(), str(mimo))
    built.model.load_state_dict(loaded, strict=False)
    for parameter, expected in reference_parameters(built, weights).items():
        assert torch.equal(live_parameters(built)[parameter], expected), parameter


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plans_boxes_are_the_models_sharded_tensors(name: str, tied: bool) -> None:
    config, _ = tiny(layers=5, tied=tied, vocab_size=321)
    layout = LAYOUTS[name].resolve()
    weight_map = family_of(config).weight_map(config)
    planned = [set() for _ in range(layout.world_size)]
    for box in plan.boxes(weight_map, layout):
        rule = weight_map.rules[box.rule]
        tensor = rule.stored[box.stored]
        shape = plan.stored_shape(tensor, layout.components[rule.component])
        for rank in box.holders:
            planned[rank].add((tensor.name, shape, *plan.box_extent(tensor, box)))
    found = run_ranks(layout.world_size, _pieces, config, LAYOUTS[name])
    for rank in range(layout.world_size):
        # A tied embedding is held again by the last stage, for the head: a replica that the plan need not know.
        assert planned[rank] <= found[rank]
        extra = {key for key, *_ in found[rank] - planned[rank]}
        assert extra <= ({"language_model.embedding.word_embeddings.weight"} if tied else set())


def _pieces(config, layout: ParallelLayout) -> set:
    built = build(config, layout.resolve())
    return {(p.key, p.global_shape, p.global_offset, tuple(p.data.shape)) for p in model_tensors(built)}


def test_a_checkpoint_that_megatron_core_wrote_is_exported_bit_for_bit(tmp_path: Path) -> None:
    """The weights of an import, saved again by dist_checkpointing under another layout, beside the import's manifest."""
    config, model = tiny(layers=5, vocab_size=321)
    source = as_hf(tmp_path / "hf", config, {n: t.detach() for n, t in model.state_dict().items()})
    convert(tmp_path / "r", "import", plain(LAYOUTS["one rank"]), model=str(source), target=str(tmp_path / "mimo"))
    layout = LAYOUTS["tp2 | tp2, images first"]
    (tmp_path / "saved").mkdir()
    run_ranks(4, _load_and_save, config, layout, tmp_path / "mimo", tmp_path / "saved")
    for file in [*(tmp_path / "mimo").glob("*.distcp"), tmp_path / "mimo/.metadata"]:
        file.unlink()
    manifest = json.loads((tmp_path / "mimo/mimo.json").read_text())
    for file in (tmp_path / "saved").iterdir():
        file.rename(tmp_path / "mimo" / file.name)
    manifest["files"] = {f.name: f.stat().st_size for f in (tmp_path / "mimo").glob("*.distcp")}
    (tmp_path / "mimo/mimo.json").write_text(json.dumps(manifest))
    export = {"source": str(tmp_path / "mimo"), "target": str(tmp_path / "out")}
    convert(tmp_path / "r2", "export", plain(LAYOUTS["uneven pp2 | images"]), **export)
    assert verify_hf(source, tmp_path / "out")["equal"]


def _load_and_save(config, layout: ParallelLayout, mimo: Path, target: Path) -> None:
    built = build(config, layout.resolve())
    load_model(built, mimo)
    save_model(built, target)
