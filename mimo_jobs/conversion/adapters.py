"""Adapters of a built model to and from PEFT directories: every rank moves its own rows and columns, nothing is gathered."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_jobs.checkpoint.manifest import versions, write_json
from mimo_jobs.checkpoint.peft_dir import (
    FORMAT,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    PeftAdapter,
    check_adapter,
    layout_of,
    parts,
    read_peft,
    tensor_name,
)
from mimo_jobs.conversion import publish
from mimo_jobs.errors import UserError
from mimo_jobs.families import family_of
from mimo_jobs.modeling.build import BuiltModel
from mimo_jobs.modeling.lora import MAGNITUDE, adapted_layers
from mimo_jobs.weights import transfer
from mimo_jobs.weights.adapters import AdaptedLinear, adapted_linears, target_modules, targeted
from mimo_jobs.weights.dtypes import cast_to, itemsize
from mimo_jobs.weights.safetensors_io import Shard, make_header, new_shard

if TYPE_CHECKING:
    from mimo_jobs.training.config import Lora


@dataclass(frozen=True)
class _Place:
    """``rows`` of a layer's ``part`` are ``count`` elements from ``first`` of the module's tensor in a PEFT file."""

    module: str
    part: str
    rows: slice
    first: int
    count: int


def write_peft(
    built: BuiltModel,
    directory: Path,
    base_model: str,
    lora: "Lora",
    *,
    base: str | None = None,
    identity: dict[str, Any] | None = None,
    overwrite: bool = False,
    run_id: str = "adapter",
) -> dict[str, Any]:
    """Write the model's adapters as PEFT's ``save_pretrained`` does, in fp32. Collective over the world.

    It appears at once, complete, or not at all; ``directory`` lies where every rank can write.

    Args:
        base_model: ``base_model_name_or_path`` of the configuration: a hub id, or a directory.
        lora: what `add_adapters` was called with.
        base: `peft_dir.base_digest` of the checkpoint that the base weights came from.
        identity: what it was made from, for pipelines.
        overwrite: replace ``directory``.
        run_id: tells the staging directories of different runs apart.

    Returns:
        Counts, bytes and the directory; the same on every rank.

    Raises:
        UserError: ``directory`` cannot be written; on every rank alike.
    """
    weight_map = _weight_map(built)
    modules = targeted(weight_map, lora.targets)
    entries = layout_of(modules, weight_map, lora.rank, lora.dora)
    shard = new_shard(directory, WEIGHTS_NAME, make_header(entries, {"format": "pt"}))
    staging, first = publish.staging_of(directory, run_id), dist.get_rank() == 0
    with _together():
        if first:
            publish.check_target(directory, overwrite)
            publish.check_space(directory, shard.size, staging)
            publish.open_staging(directory, run_id, plan="")
            with open(staging / WEIGHTS_NAME, "wb") as file:
                file.write(len(shard.header).to_bytes(8, "little") + shard.header)
                file.truncate(shard.size)
    try:
        with _together(), transfer.Files() as files:
            _write_own(built, shard, files.writer(staging / WEIGHTS_NAME))
            files.sync()
        with _together():
            if first:
                _write_config(staging, base_model, lora, target_modules(weight_map, modules))
                own = {"format": FORMAT, "base": base, "identity": identity or {}, "versions": versions()}
                write_json(staging / MANIFEST_NAME, own)
                publish.publish(staging, directory, overwrite)
    except BaseException:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return {
        "target": str(directory),
        "modules": len(modules),
        "tensors": len(shard.tensors),
        "bytes": sum(t.nbytes for t in shard.tensors.values()),
    }


def fill_adapters(built: BuiltModel, directory: Path) -> PeftAdapter:
    """Fill this rank's adapters from a PEFT directory, reading only its rows and columns. No communication.

    `add_adapters` comes before, with ``read_peft(directory).applied_to(lora)``.

    Raises:
        UserError: see `read_peft`; or the adapter is of other modules, another rank or another base than the model's.
    """
    adapter = read_peft(directory)
    check_adapter(adapter, _weight_map(built), "this model")
    layers = adapted_layers(built)
    stored = adapted_linears(_weight_map(built), adapter.modules, built.layout, dist.get_rank())
    if other := {m for x in layers.values() for m in x.adapted.modules} ^ {
        m for x in stored.values() for m in x.modules
    }:
        which = "has an adapter of {}, the model has none" if min(other) in adapter.modules else "has no adapter of {}"
        raise UserError(
            f"{directory}: {which.format(min(other))}; set lora.targets to the modules that the adapter has"
        )
    with transfer.Files() as files, torch.no_grad():
        source = files.reader(directory / WEIGHTS_NAME)
        for layer in layers.values():
            rank = layer.lora_B.shape[1]
            if rank != adapter.rank:
                raise UserError(
                    f"{directory}: has r={adapter.rank}, the model lora.rank={rank}; set lora.rank={adapter.rank}"
                )
            if (layer.lora_magnitude_vector is not None) != adapter.dora:
                raise UserError(f"{directory}: has use_dora={adapter.dora}; set lora.dora={str(adapter.dora).lower()}")
            for place in _places(layer.adapted, rank, adapter.dora):
                info = adapter.tensors[f"{place.module}.{place.part}"]
                raw = memoryview(bytearray(place.count * itemsize(info.dtype)))
                transfer.read_full(source, raw, info.offset + place.first * itemsize(info.dtype))
                cast = cast_to(info.dtype, "F32")
                values = torch.frombuffer(cast(raw) if cast else raw, dtype=torch.float32)
                part = getattr(layer, place.part)[place.rows]
                part.copy_(values.view(part.shape))
    return adapter


def _weight_map(built: BuiltModel) -> Any:
    config = built.hf.to_dict()
    return family_of(config).weight_map(config)


def _places(layer: AdaptedLinear, rank: int, dora: bool) -> Iterator[_Place]:
    """Everything that a layer's adapter holds on this rank."""
    whole = layer.columns == layer.in_features
    for number, module in enumerate(layer.modules):
        start = number * rank
        if whole:
            yield _Place(module, "lora_A", slice(start, start + rank), 0, rank * layer.in_features)
            continue
        for i in range(rank):
            first = i * layer.in_features + layer.column
            yield _Place(module, "lora_A", slice(start + i, start + i + 1), first, layer.columns)
    for run in layer.runs:
        rows = slice(run.row, run.row + run.count)
        yield _Place(layer.modules[run.module], "lora_B", rows, run.hf_row * rank, run.count * rank)
        if dora:
            yield _Place(layer.modules[run.module], MAGNITUDE, rows, run.hf_row, run.count)


def _write_own(built: BuiltModel, shard: Shard, target: int) -> None:
    """What this rank alone holds, and, on the first of those that hold copies, the copies."""
    for layer in adapted_layers(built).values():
        groups = built.groups[layer.adapted.component]
        if groups.dp_cp.rank() != 0:
            continue
        dora = layer.lora_magnitude_vector is not None
        cut = ("lora_A",) if layer.adapted.by_columns else ("lora_B", MAGNITUDE)
        values = {part: _host(getattr(layer, part)) for part in parts(dora)}
        for place in _places(layer.adapted, layer.lora_B.shape[1], dora):
            if place.part in cut or groups.tp.rank() == 0:
                raw = values[place.part][place.rows].contiguous().view(torch.uint8).numpy()
                info = shard.tensors[tensor_name(place.module, place.part)]
                transfer.write_full(target, memoryview(raw).cast("B"), info.offset + place.first * itemsize("F32"))


def _host(parameter: Tensor) -> Tensor:
    return parameter.detach().float().cpu()


def _write_config(staging: Path, base_model: str, lora: "Lora", modules: list[str]) -> None:
    from peft import LoraConfig

    alpha: Any = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = LoraConfig(
        r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora, use_dora=lora.dora,
        task_type="CAUSAL_LM", base_model_name_or_path=base_model, inference_mode=True,
    )  # fmt: skip
    config.target_modules = modules  # PEFT makes a set of the argument, whose order would change from run to run
    config.save_pretrained(str(staging))


@contextmanager
def _together() -> Iterator[None]:
    """What fails on one rank fails on all of them, with the first rank's message: none is left waiting."""
    problem = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(problem) if problem else None)
    if problem is not None:
        raise problem
    if message := next((m for m in found if m), None):
        raise UserError(message)
