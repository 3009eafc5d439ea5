"""PEFT directories: what PEFT writes loads here, what is written here loads in PEFT, bit for bit and with the same logits."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mimo_jobs.checkpoint.model_io import adapter_state, adapter_tensors
from mimo_jobs.checkpoint.peft_dir import read_peft
from mimo_jobs.conversion.adapters import fill_adapters, write_peft
from mimo_jobs.errors import UserError
from mimo_jobs.families import family_of
from mimo_jobs.layout import ComponentLayout as Layout
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.modeling.build import BuiltModel, build
from mimo_jobs.modeling.forward import forward_logits, mrope_position_ids
from mimo_jobs.modeling.lora import add_adapters
from mimo_jobs.training.config import Lora
from mimo_jobs.weights.adapters import targeted
from tests.conversion_ranks import convert
from tests.gloo.adapters import gradients, live_adapters, peft_model, wrap
from tests.gloo.batches import SAME_SIZE, VARIED, Batch, hf_logits, image_batch, tiny
from tests.gloo.processes import run_ranks
from tests.gloo.reference_weights import load_reference
from tests.gloo.test_import_into_model import as_hf, plain

pytestmark = pytest.mark.gloo

TOLERANCE = 5e-5
LAYOUTS = {
    "colocated tp2 with sequence parallel / dp2": (ParallelLayout(Layout(tp=2), Layout(dp=2), 2), True),
    "images tp2 beside pp2": (ParallelLayout(Layout(pp=2, rank_offset=2), Layout(tp=2, rank_offset=0)), False),
}


@pytest.mark.parametrize(("name", "dora"), zip(LAYOUTS, (True, False), strict=True))
def test_an_adapter_goes_from_peft_to_the_model_and_back(tmp_path: Path, name: str, dora: bool) -> None:
    layout, sequence_parallel = LAYOUTS[name]
    config, model = tiny()
    modules = targeted(family_of(config).weight_map(config), "language,images")
    theirs = peft_model(model, modules, r=4, lora_alpha=6, use_rslora=True, use_dora=dora)
    theirs.save_pretrained(tmp_path / "theirs")
    batch = image_batch(config, SAME_SIZE)
    with torch.no_grad():
        expected = hf_logits(theirs, batch)
    results = run_ranks(
        layout.resolve().world_size,
        _fill_and_write,
        config,
        model.state_dict(),
        layout,
        sequence_parallel,
        tmp_path,
        batch,
    )
    found = [logits for logits in results if logits is not None]
    assert found and max((logits - expected).abs().max().item() for logits in found) < TOLERANCE
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ours = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert torch.equal(hf_logits(ours, batch), expected)
    assert {n for n, _ in ours.named_parameters() if "lora_" in n} == {
        n for n, _ in theirs.named_parameters() if "lora_" in n
    }
    assert not list(tmp_path.glob(".*"))


def _fill_and_write(
    config: dict[str, Any], weights: dict, layout: ParallelLayout, sequence_parallel: bool, root: Path, batch: Batch
) -> torch.Tensor | None:
    built = build(config, layout.resolve(), sequence_parallel=sequence_parallel)
    load_reference(built, weights)
    lora = read_peft(root / "theirs").applied_to(Lora())
    add_adapters(built, lora)
    fill_adapters(built, root / "theirs")
    write_peft(built, root / "ours", "base/model", lora, base="abc", run_id="r")
    with pytest.raises(UserError, match="exists"):
        write_peft(built, root / "ours", "base/model", lora)
    built.model.eval()
    positions = mrope_position_ids(built.hf, batch.input_ids, batch.grid_thw)
    return forward_logits(built, batch.input_ids, positions, batch.pixel_values, batch.grid_thw)


@pytest.mark.parametrize(
    ("dtype", "dora", "bound"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 1e-6), (torch.bfloat16, False, 2**-8)],
)
def test_a_merged_export_is_what_peft_merges(tmp_path: Path, dtype: torch.dtype, dora: bool, bound: float) -> None:
    """fp32: to 1e-6; bf16: relative to each value, one rounding of it."""
    config, model = tiny(tied=True)
    base = copy.deepcopy(model).to(dtype)
    modules = targeted(family_of(config).weight_map(config), "language,images")
    theirs = peft_model(model, modules, r=4, lora_alpha=6, use_dora=dora)
    theirs.save_pretrained(tmp_path / "adapter")
    source = as_hf(tmp_path / "hf", config, {n: t.detach() for n, t in base.state_dict().items()})
    for layout, job, arguments in (
        (PP2, "import", {"model": source, "target": tmp_path / "mimo"}),
        (TP2, "export", {"source": tmp_path / "mimo", "target": tmp_path / "out", "adapter": tmp_path / "adapter"}),
    ):
        convert(tmp_path / job, job, plain(layout), **{n: str(path) for n, path in arguments.items()})
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    ours = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert ours.keys() == merged.keys() - {"lm_head.weight"}
    for name, found in ours.items():
        assert found.dtype == merged[name].dtype
        difference, scale = (found.double() - merged[name].double()).abs(), merged[name].double().abs()
        assert (difference <= (bound if dtype == torch.float32 else bound * scale)).all(), name
        if name.removesuffix(".weight") not in modules:
            assert torch.equal(found, merged[name])


TP2, PP2 = ParallelLayout(Layout(tp=2), Layout(tp=2), 2), ParallelLayout(Layout(pp=2), Layout())


def test_adapters_and_optimizer_go_on_in_another_layout(tmp_path: Path) -> None:
    """After two steps at tp2 and a checkpoint, the third step is the same at tp2 and at pp2 beside images."""
    config, model = tiny()
    batch = image_batch(config, VARIED, seq=44)
    (tmp_path / "checkpoint").mkdir()
    saved = run_ranks(2, _train, config, model.state_dict(), TP2, tmp_path, batch)
    loaded = run_ranks(3, _go_on, config, model.state_dict(), PP2, tmp_path, batch)
    assert saved + loaded == pytest.approx([saved[0]] * 5, rel=1e-4)
    names = ("started", "started at pp2", "tp", "pp")
    started, same, tp, pp = (load_file(tmp_path / name / "adapter_model.safetensors") for name in names)
    assert all(torch.equal(started[n], same[n]) for n in started)
    assert tp.keys() == pp.keys() and max((tp[n] - pp[n]).abs().max().item() for n in tp) < 1e-5
    assert all((tp[n] - started[n]).abs().mean() > 1e-4 for n in tp)


def test_a_checkpoint_of_adapters_holds_nothing_else_and_tiles_its_tensors(tmp_path: Path) -> None:
    config, model = tiny()
    elements: dict[str, int] = {}
    shapes: dict[str, torch.Size] = {}
    for rank in run_ranks(2, _pieces, config, model.state_dict()):
        for key, shape, size in rank:
            shapes[key] = torch.Size(shape)
            elements[key] = elements.get(key, 0) + size
    assert elements == {key: shape.numel() for key, shape in shapes.items()}
    assert all(".lora_" in key for key in shapes)
    assert shapes["language_model.decoder.layers.0.self_attention.in_proj.lora_B.query"] == (32, 4)


LORA = Lora(rank=4, alpha=8, targets="language,images")
RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def _started(config: dict[str, Any], weights: dict, layout: ParallelLayout) -> tuple[BuiltModel, Any, Any]:
    built = build(config, layout.resolve(), sequence_parallel=True)
    load_reference(built, weights)
    add_adapters(built, LORA, seed=7)
    wrapped = wrap(built, sharded=True)
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.0, clip_grad=1.0, use_distributed_optimizer=True
    )
    return built, wrapped, get_mimo_optimizer(built.model, settings)


def _train(config: dict[str, Any], weights: dict, layout: ParallelLayout, root: Path, batch: Batch) -> float:
    built, wrapped, optimizer = _started(config, weights, layout)
    write_peft(built, root / "started", "base", LORA)
    for _ in range(2):
        gradients(built, wrapped, batch)
        optimizer.step()
    model = adapter_state(built)
    state = {"model": model, "optimizer": optimizer.sharded_state_dict(model, metadata=RESHARDABLE)}
    dist_checkpointing.save(state, str(root / "checkpoint"))
    return _last(built, wrapped, optimizer, batch, root / "tp")


def _go_on(config: dict[str, Any], weights: dict, layout: ParallelLayout, root: Path, batch: Batch) -> float:
    built, wrapped, optimizer = _started(config, weights, layout)
    write_peft(built, root / "started at pp2", "base", LORA)
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    # torch's Adam keeps "step" among its states, which megatron-core stores with the groups and then misses here
    DistributedOptimizer._set_main_param_and_optimizer_states = lambda o, p, t: set_states(o, p, {"step": None, **t})
    gradients(built, wrapped, batch)
    optimizer.step()  # makes the states that are loaded; torch's Adam has none before
    model = adapter_state(built)
    state = {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=RESHARDABLE)}
    loaded: Any = dist_checkpointing.load(state, str(root / "checkpoint"))
    live = adapter_state(built)
    with torch.no_grad():
        for name, value in loaded["model"].items():
            live[name].data.copy_(value)
    optimizer.load_state_dict(loaded["optimizer"])
    for active in optimizer._active_optimizers:
        for inner in active.chained_optimizers:
            for moments in inner.optimizer.state.values():
                moments["step"] = moments["step"].clone()  # one tensor for all of them would count each step many times
    return _last(built, wrapped, optimizer, batch, root / "pp")


def _last(built: BuiltModel, wrapped: Any, optimizer: Any, batch: Batch, directory: Path) -> float:
    gradients(built, wrapped, batch)
    _, norm, _ = optimizer.step()
    write_peft(built, directory, "base", LORA)
    return float(norm)


def _pieces(config: dict[str, Any], weights: dict) -> list[tuple[str, tuple[int, ...], int]]:
    built = build(config, TP2.resolve())
    load_reference(built, weights)
    add_adapters(built, LORA)
    with torch.no_grad():
        for piece in adapter_tensors(built):
            piece.data.fill_(7.0)
    assert all((p == 7).all() for p in live_adapters(built).values())
    return [(p.key, p.global_shape, p.data.numel()) for p in adapter_tensors(built) if p.writes]
