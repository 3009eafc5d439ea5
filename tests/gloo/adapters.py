"""An independent statement of where PEFT's A and B lie in the layers of one rank, and one training step on them."""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from torch import Tensor

from mimo_jobs.layout import IMAGES, LANGUAGE
from mimo_jobs.modeling.build import ENCODER, BuiltModel
from mimo_jobs.modeling.forward import mrope_position_ids
from mimo_jobs.modeling.lora import MAGNITUDE, adapted_layers
from mimo_jobs.modeling.loss import Targets
from mimo_jobs.training.step import trained_components, wrap_for_training
from tests.gloo.batches import Batch, hf_logits
from tests.gloo.reference_weights import reference_parameters

_ROW_PARALLEL = ("linear_fc2", "linear_proj", "out_proj")
_PEFT = "base_model.model."


def peft_model(model: torch.nn.Module, modules: tuple[str, ...], seed: int = 3, **settings: Any) -> Any:
    """A PEFT model around a copy of ``model`` with adapters of random A and B (B does not start at zero)."""
    config = peft.LoraConfig(target_modules=list(modules), task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return wrapped.eval()


def adapter_values(model: Any) -> dict[str, Tensor]:
    """``MODULE.lora_A`` / ``MODULE.lora_B`` -> value."""
    return {_short(n): p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def exact_gradients(model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of PEFT in fp64."""
    exact = copy.deepcopy(model).double()
    pixels = None if batch.pixel_values is None else batch.pixel_values.double()
    logits = hf_logits(exact, replace(batch, pixel_values=pixels))
    loss = F.cross_entropy(logits.flatten(0, 1), labels(batch).flatten())
    loss.backward()
    return loss.item(), {_short(n): p.grad for n, p in exact.named_parameters() if "lora_" in n}


def labels(batch: Batch) -> Tensor:
    return batch.input_ids.roll(-1, 1)


def _short(name: str) -> str:
    module, _, rest = name.removeprefix(_PEFT).partition(".lora_")
    return f"{module}.lora_{rest.split('.')[0]}"


def reference_adapters(
    built: BuiltModel, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], rank: int
) -> dict[str, Tensor]:
    """Checkpoint key of an adapter's parameter to its value on this rank, by plain slicing.

    ``weights``: shapes of the base model. B's rows are those of the weight, so the oracle of the weights places them, widened.
    """
    wide = {n: torch.zeros_like(t, dtype=next(iter(values.values())).dtype) for n, t in weights.items()}
    for name, value in values.items():
        module, _, part = name.rpartition(".")
        if part == "lora_B":
            wide[f"{module}.weight"][:, :rank] = value
        elif part == MAGNITUDE:
            wide[f"{module}.weight"][:, rank] = value
    placed = {_checkpoint_key(built, n): t for n, t in reference_parameters(built, wide).items()}
    found = {}
    for key, layer in adapted_layers(built).items():
        stacked = torch.cat([values[f"{m}.lora_A"] for m in layer.adapted.modules])
        if key.endswith(_ROW_PARALLEL) or key.endswith("merger.linear_fc2"):
            tp = layer.tp_group
            found[f"{key}.lora_A"] = stacked.chunk(tp.size(), 1)[tp.rank()]
            (module,) = layer.adapted.modules
            found[f"{key}.lora_B"] = values[f"{module}.lora_B"]
            found[f"{key}.{MAGNITUDE}"] = values.get(f"{module}.{MAGNITUDE}")
        else:
            found[f"{key}.lora_A"] = stacked
            found[f"{key}.lora_B"] = placed[f"{key}.weight"][:, :rank]
            found[f"{key}.{MAGNITUDE}"] = placed[f"{key}.weight"][:, rank]
        if layer.lora_magnitude_vector is None:
            del found[f"{key}.{MAGNITUDE}"]
    return found


def live_adapters(built: BuiltModel) -> dict[str, torch.nn.Parameter]:
    return {
        f"{key}.{name}": getattr(layer, name)
        for key, layer in adapted_layers(built).items()
        for name in ("lora_A", "lora_B", MAGNITUDE)
        if getattr(layer, name) is not None
    }


def load_adapters(built: BuiltModel, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], rank: int) -> None:
    """Give every adapter of this rank its values."""
    wanted, live = reference_adapters(built, weights, values, rank), live_adapters(built)
    assert wanted.keys() == live.keys()
    with torch.no_grad():
        for name, value in wanted.items():
            assert live[name].shape == value.shape, (name, live[name].shape, value.shape)
            live[name].copy_(value)


def _checkpoint_key(built: BuiltModel, name: str) -> str:
    component, _, rest = name.partition(".")
    if component == IMAGES:
        return f"modality_submodules.images.encoders.vision.{rest}"
    if rest.startswith("decoder.layers."):
        _, _, local, tail = rest.split(".", 3)
        assert built.language is not None
        rest = f"decoder.layers.{built.language.decoder.layers[int(local)].layer_number - 1}.{tail}"
    return f"language_model.{rest}"


def wrap(built: BuiltModel, sharded: bool = False) -> dict[str, DistributedDataParallel]:
    """Wrap the components that train, as training does."""
    wrap_for_training(built, sharded=sharded)
    return trained_components(built)


def gradients(built: BuiltModel, wrapped: Mapping[str, DistributedDataParallel], batch: Batch) -> float | None:
    """One forward and backward pass with finalized ``main_grad``; the mean loss where it is known. dp is 1."""
    for module in wrapped.values():
        module.zero_grad_buffer()
    images = {IMAGES: {ENCODER: dict(pixel_values=batch.pixel_values, grid_thw=batch.grid_thw)}}
    inputs: dict[str, Any] = dict(
        input_ids=batch.input_ids,
        position_ids=mrope_position_ids(built.hf, batch.input_ids, batch.grid_thw),
        targets=Targets.of(labels(batch)) if LANGUAGE in built.groups else None,
        modality_inputs=images if IMAGES in built.groups and batch.pixel_values is not None else None,
    )
    if built.layout.colocated:
        total, _ = built.model(**inputs)
        mean = total / batch.input_ids.numel()
        mean.backward()
        loss = mean.item()
    else:
        loss = _pipelined(built, inputs, batch)
    for component, module in wrapped.items():
        finalize_model_grads([module], None, built.groups[component], force_all_reduce=True)
    return loss


def _pipelined(built: BuiltModel, inputs: dict[str, Any], batch: Batch) -> float | None:
    def mean(total: Tensor) -> tuple[Tensor, dict[str, float]]:
        loss = total / batch.input_ids.numel()
        return loss, {"loss": loss.item()}

    def step(_data: Any, model: torch.nn.Module) -> tuple[Any, Any]:
        return model(**inputs)[0], partial(mean)

    built.model.config.no_sync_func = contextlib.nullcontext
    schedule: Any = forward_backward_pipelining_without_interleaving
    found = schedule(
        forward_step_func=step, data_iterator=None, model=[built.model], num_microbatches=1,
        seq_length=batch.input_ids.shape[1], micro_batch_size=len(batch.input_ids), p2p_communicator=built.communicator,
        pg_collection=MultiModuleProcessGroupCollection(built.groups, LANGUAGE if LANGUAGE in built.groups else None),
    )  # fmt: skip
    return found[0]["loss"] if found else None
