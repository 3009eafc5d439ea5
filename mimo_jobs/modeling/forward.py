"""One forward pass of a built model in any layout, for verification: the whole batch in, the whole logits out."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedConfig

from mimo_jobs.layout import LANGUAGE
from mimo_jobs.modeling.build import ENCODER, IMAGES, BuiltModel


def mrope_position_ids(hf: PreTrainedConfig, input_ids: Tensor, image_grid_thw: Tensor | None = None) -> Tensor:
    """Positions along t, h and w as transformers computes them, without building its model.

    Args:
        hf: the whole model's config.
        input_ids: int64 (batch, seq), right-padded if at all.
        image_grid_thw: int64 (images, 3), the images of the batch in order.

    Returns:
        int64 (3, batch, seq).
    """
    model_class: Any = MODEL_MAPPING[type(hf)]
    bare = model_class.__new__(model_class)  # get_rope_index reads nothing but the config
    bare.__dict__["config"] = hf
    is_image = (input_ids == hf.image_token_id).int()
    return bare.get_rope_index(input_ids, is_image, image_grid_thw=image_grid_thw)[0]


@torch.no_grad()
def forward_logits(
    built: BuiltModel,
    input_ids: Tensor,
    position_ids: Tensor,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
) -> Tensor | None:
    """Run one batch. Collective over the world; every rank passes the same whole batch.

    Args:
        input_ids: int64 (batch, seq), right-padded if at all; batch divides by every component's dp.
        position_ids: int64 (3, batch, seq) of `mrope_position_ids`.
        pixel_values: (patches, features) of all images, or None for text only.
        image_grid_thw: int64 (images, 3).

    Returns:
        (batch, seq, vocab) on ranks of the language's last stage, None elsewhere.
    """
    length = input_ids.shape[1]
    config = built.configs[LANGUAGE]
    if config.sequence_parallel:  # padding at the end changes nothing before it
        more = -length % config.tensor_model_parallel_size
        input_ids, position_ids = F.pad(input_ids, (0, more)), F.pad(position_ids, (0, more))
    inputs = _local_inputs(built, input_ids, position_ids, pixel_values, image_grid_thw)
    logits = built.model(**inputs)[0] if built.layout.colocated else _pipelined(built, inputs)
    return None if logits is None else _whole(built, logits)[:, :length]


def _local_inputs(
    built: BuiltModel, input_ids: Tensor, position_ids: Tensor, pixel_values: Tensor | None, grid_thw: Tensor | None
) -> dict[str, Any]:
    """The arguments of ``MimoModel.forward`` on this rank: rows by language dp, images by the rows of images dp."""
    images = None
    if IMAGES in built.groups and pixel_values is not None and grid_thw is not None:
        rows = _rows(built, IMAGES, len(input_ids))
        images = {IMAGES: {ENCODER: _images_of_rows(built, input_ids, rows, pixel_values, grid_thw)}}
    rows = _rows(built, LANGUAGE if LANGUAGE in built.groups else IMAGES, len(input_ids))
    return dict(input_ids=input_ids[rows], position_ids=position_ids[:, rows], modality_inputs=images)


def _rows(built: BuiltModel, component: str, batch: int) -> slice:
    data_parallel = built.groups[component].dp
    share, rest = divmod(batch, data_parallel.size())
    assert not rest, (component, batch, data_parallel.size())
    return slice(data_parallel.rank() * share, (data_parallel.rank() + 1) * share)


def _images_of_rows(
    built: BuiltModel, input_ids: Tensor, rows: slice, pixel_values: Tensor, grid_thw: Tensor
) -> dict[str, Tensor]:
    """The images whose tokens stand in these rows of the batch."""
    patches = grid_thw.prod(-1)
    token_ends = (patches // built.hf.vision_config.spatial_merge_size**2).cumsum(0)
    row_ends = (input_ids == built.hf.image_token_id).sum(1).cumsum(0)
    row_of_image = torch.searchsorted(row_ends, token_ends)
    chosen = (row_of_image >= rows.start) & (row_of_image < rows.stop)
    return dict(pixel_values=pixel_values[chosen.repeat_interleave(patches)], grid_thw=grid_thw[chosen])


def _pipelined(built: BuiltModel, inputs: dict[str, Any]) -> Tensor | None:
    """One microbatch through megatron-core's schedule; the last stage gets the logits of its shard."""

    def step(_data: Any, model: torch.nn.Module) -> tuple[Any, Any]:
        return model(**inputs)[0], lambda output, non_loss_data: output

    batch, seq = inputs["input_ids"].shape
    schedule: Any = forward_backward_pipelining_without_interleaving  # annotated for single-module models
    collected = schedule(
        forward_step_func=step,
        data_iterator=None,
        model=[built.model],
        num_microbatches=1,
        seq_length=seq,
        micro_batch_size=batch,
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=built.communicator,
        pg_collection=MultiModuleProcessGroupCollection(built.groups, LANGUAGE if LANGUAGE in built.groups else None),
    )
    return collected[0] if collected else None


def _whole(built: BuiltModel, logits: Tensor) -> Tensor:
    """(batch / dp, seq, padded vocab / tp) to (batch, seq, vocab)."""
    groups = built.groups[LANGUAGE]
    logits = _gathered(logits, groups.tp, -1)[..., : built.hf.text_config.vocab_size]
    return _gathered(logits, groups.dp, 0)


def _gathered(local: Tensor, group: torch.distributed.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim)
