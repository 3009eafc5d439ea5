"""One optimizer step's forward and backward passes in any layout, on megatron-core's schedules.

The loss of a step is the sum over its tokens divided by their number, over all microbatches and replicas (what transformers
computes with ``num_items_in_batch``): the sums that are passed backward are divided by a number every rank has from the `StepTable`,
so that gradients are only summed, without communication or a pass of their own for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from torch import Tensor

from mimo_jobs.layout import IMAGES, LANGUAGE
from mimo_jobs.modeling.build import BuiltModel
from mimo_jobs.training.batches import Microbatch
from mimo_jobs.training.stopwatch import Stopwatch


def wrap_for_training(built: BuiltModel, *, sharded: bool = True, wide_gradients: bool = True) -> None:
    """Put DDP around each component of this rank that has a parameter to train.

    Args:
        sharded: each data-parallel rank ends with the sum of its share of the gradients, for the distributed optimizer.
        wide_gradients: gradients are summed in fp32, not in the parameters' dtype.
    """
    for name in built.groups:
        module = component_module(built, name)
        if not any(p.requires_grad for p in module.parameters()):
            continue
        # Every parameter of the decoder gets a gradient in every microbatch; those of the tower get none where there is no image.
        overlapped = name == LANGUAGE and built.groups[name].dp.size() > 1
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=wide_gradients, use_distributed_optimizer=sharded, overlap_grad_reduce=overlapped
        )
        wrapped = DistributedDataParallel(built.configs[name], config, module, pg_collection=built.groups[name])
        if name == LANGUAGE:
            built.model.language_model = wrapped
        else:
            built.model.modality_submodules[name] = wrapped


def component_module(built: BuiltModel, component: str) -> torch.nn.Module:
    """A component of this rank, wrapped or not."""
    module: Any = built.model.language_model if component == LANGUAGE else built.model.modality_submodules[component]
    return module


def trained_components(built: BuiltModel) -> dict[str, DistributedDataParallel]:
    """The components of this rank that train."""
    found = {name: component_module(built, name) for name in built.groups}
    return {name: module for name, module in found.items() if isinstance(module, DistributedDataParallel)}


def is_loss_rank(built: BuiltModel) -> bool:
    """Whether this rank is the one of its data-parallel replica that reports the loss: tp 0 of the last stage."""
    groups = built.groups.get(LANGUAGE)
    return groups is not None and groups.tp.rank() == 0 and groups.pp.rank() == groups.pp.size() - 1


def watch_images(built: BuiltModel, watch: Stopwatch) -> None:
    """Count the tower's forward and backward passes as images, on ranks that have both components."""
    tower = built.vision
    if tower is None or built.language is None:
        return

    def started(_module: object, _inputs: object) -> None:
        watch.start(IMAGES)

    def ended(_module: object, _inputs: object, output: Tensor) -> None:
        watch.stop(IMAGES)
        if output.grad_fn is not None:
            output.register_hook(lambda _gradient: watch.start(IMAGES))

    tower.register_forward_pre_hook(started)
    tower.register_forward_hook(ended)
    # The gradient of the first layer comes last.
    trained = [p for p in tower.parameters() if p.requires_grad]
    if trained:
        trained[0].register_post_accumulate_grad_hook(lambda _parameter: watch.stop(IMAGES))


def run_step(
    built: BuiltModel, microbatches: Sequence[Microbatch], loss_tokens: int, watch: Stopwatch, *, train: bool = True
) -> Tensor:
    """Forward, and backward when training, of every microbatch; gradients, of the loss divided by ``loss_tokens``, are reduced.

    Collective over the world.

    Returns:
        fp32 scalar on the device: the summed loss of this rank's replica where `is_loss_rank`, 0 elsewhere.
    """
    config = built.model.config
    config.finalize_model_grads_func = partial(_finalize, built)
    config.no_sync_func = built.model.no_sync
    if train:
        built.model.zero_grad_buffer()
    arguments: dict[str, Any] = dict(
        forward_step_func=partial(_forward_step, watch, loss_tokens),
        data_iterator=iter(microbatches),
        model=[built.model],
        num_microbatches=len(microbatches),
        seq_length=max(m.seq_length for m in microbatches),
        micro_batch_size=1,
        forward_only=not train,
    )
    if built.layout.colocated:
        reported = forward_backward_no_pipelining(**arguments, pg_collection=built.groups[LANGUAGE])
    else:
        schedule: Any = forward_backward_pipelining_without_interleaving  # annotated for single-module models
        groups = MultiModuleProcessGroupCollection(built.groups, LANGUAGE if LANGUAGE in built.groups else None)
        with _waits(built, watch):
            reported = schedule(**arguments, p2p_communicator=built.communicator, pg_collection=groups)
    if not reported or not is_loss_rank(built):
        return torch.zeros((), device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
    return torch.stack([r["loss"] for r in reported]).sum()


def _forward_step(
    watch: Stopwatch, loss_tokens: int, microbatches: Iterator[Microbatch], model: Any
) -> tuple[Any, Any]:
    microbatch = next(microbatches)
    with watch.span("forward"):
        output, _ = model(**microbatch.inputs)
    if "targets" not in microbatch.inputs or not model.role.is_last_stage(LANGUAGE):
        return output, None
    return output, partial(_loss, loss_tokens)


def _loss(loss_tokens: int, loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What to pass backward, a number of tokens that megatron-core wants and nobody reads, and the summed loss to report."""
    return loss / max(1, loss_tokens), torch.ones((), dtype=torch.int), {"loss": loss.detach()}


def _finalize(
    built: BuiltModel,
    model: Any,
    num_tokens: Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool = False,
    **_: object,
) -> None:
    """Reduce gradients within each component's own groups."""
    for name, wrapped in trained_components(built).items():
        finalize_model_grads([wrapped], None, built.groups[name], force_all_reduce)


_COMMUNICATION = (
    "recv_forward", "recv_backward", "send_forward", "send_backward", "send_forward_recv_backward",
    "send_backward_recv_forward",
)  # fmt: skip


@contextmanager
def _waits(built: BuiltModel, watch: Stopwatch) -> Iterator[None]:
    """Count the time inside the communicator as waiting: for another stage, or another component."""
    communicator = built.communicator
    assert communicator is not None

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with watch.span("waiting"):
                return function(*args, **kwargs)

        return call

    for name in _COMMUNICATION:
        setattr(communicator, name, timed(getattr(type(communicator), name).__get__(communicator)))
    try:
        yield
    finally:
        for name in _COMMUNICATION:
            delattr(communicator, name)
