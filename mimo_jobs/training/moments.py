"""Optimizer state in a checkpoint: every rank writes and reads what it owns, no more.

megatron-core's distributed optimizer gives each data parallel rank a range of the elements of a parameter. Its own fully reshardable
form (0.19.2, `DistributedOptimizer.sharded_param_state_fully_reshardable`) gathers them first: 12 bytes a parameter on every rank.
Here the range is cut into blocks of the parameter instead, which is what a ``torch_dist`` checkpoint stores; the names are the same,
so that any layout reads what any other wrote.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mimo_jobs.training.adamw import NarrowAdamW

Block = tuple[tuple[int, ...], tuple[int, ...]]  # offset and size, an entry an axis

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}  # the form that `own_state` stands in for
_PREFIX = "optimizer.state"
_STORED = {"param": "fp32_param"}  # names in a checkpoint, as megatron-core has them


def share_out(optimizer: DistributedOptimizer) -> None:
    """Have ``optimizer.sharded_state_dict`` describe this rank's own state instead of a gathered one."""
    optimizer.sharded_param_state_fully_reshardable = partial(own_state, optimizer)  # pyright: ignore[reportAttributeAccessIssue]


def own_state(
    optimizer: DistributedOptimizer,
    model_state: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[str, ShardedTensor]:
    """Master weights (fp32) and moments of this rank: views of the live state.

    Args:
        model_state: sharded tensors and factories of the parameters; ``.data`` are the live ones.
        is_loading, metadata: as megatron-core passes them; both are of no influence.

    Returns: name and global offset -> block.
    """
    described = {id(value.data): value for value in nested_values(model_state) if hasattr(value, "data")}
    found = {}
    for parameter, start, stop in _owned(optimizer):
        pieces = list(_pieces(described[id(parameter)], parameter))
        for name, values in optimizer._get_main_param_and_optimizer_states(parameter).items():
            if name == "step":  # one number for all: kept with the parameter groups
                continue
            for piece in pieces:
                for block in _blocks_of(piece, values, start, stop, f"{_PREFIX}.{_STORED.get(name, name)}.{piece.key}"):
                    found[f"{block.key}@{block.global_offset}"] = block
    return found


def load_own_state(optimizer: DistributedOptimizer, model_state: dict[str, Any], loaded: dict[str, Tensor]) -> None:
    """Take over what was read for `own_state`: mostly it lies where it belongs already."""
    for name, block in own_state(optimizer, model_state).items():
        assert block.data is not None
        if loaded[name].data_ptr() != block.data.data_ptr():
            block.data.copy_(loaded[name])
    # megatron-core gives all parameters the same tensor, which each of them would then count up.
    on_host = isinstance(optimizer.optimizer, NarrowAdamW)
    for parameter, state in optimizer.optimizer.state.items():
        device = torch.device("cpu") if on_host else parameter.device
        state["step"] = state["step"].to(device, torch.float32, copy=True)


def _owned(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int]]:
    """Parameters of which this rank owns elements, and which, counted in the flattened parameter."""
    for buffers in optimizer.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(described: ShardedTensor | ShardedTensorFactory, parameter: Tensor) -> Iterator[ShardedTensor]:
    """What a checkpoint stores of a parameter, as views of one on the meta device: where each lies in it, without any bytes."""
    placed: Any = replace(described, data=torch.empty_like(parameter, device="meta"))
    if isinstance(placed, ShardedTensorFactory):
        yield from nested_values(placed.build())
    else:
        yield placed


def _blocks_of(piece: ShardedTensor, values: Tensor, start: int, stop: int, key: str) -> Iterator[ShardedTensor]:
    """Blocks of a piece that elements ``[start, stop)`` of its parameter hold; ``values`` are these."""
    assert piece.data is not None and piece.data.is_contiguous(), piece.key
    first, stored = int(piece.data.storage_offset()), int(piece.data.numel())
    at = max(start, first)
    for offset, size in blocks(piece.local_shape, at - first, min(stop, first + stored) - first):
        here, at = at - start, at + math.prod(size)
        whole = (1,) * piece.prepend_axis_num + size
        offsets = (0,) * piece.prepend_axis_num + offset
        yield replace(
            piece,
            key=key,
            data=values[here : here + math.prod(size)].view(whole),
            dtype=values.dtype,
            local_shape=whole,
            global_offset=tuple(a + b for a, b in zip(piece.global_offset, offsets, strict=True)),
            axis_fragmentations=None,  # blocks of different sizes
            prepend_axis_num=0,
            replica_id=(*cast(tuple[int, ...], piece.replica_id)[:2], 0),  # data parallel ranks own different elements
        )


def blocks(shape: tuple[int, ...], start: int, stop: int) -> list[Block]:
    """Elements ``[start, stop)`` of an array in row-major order as blocks of it, in that order: at most two an axis, and one."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row

    def inside(index: int, begin: int, end: int) -> list[Block]:
        return [((index, *offset), (1, *size)) for offset, size in blocks(shape[1:], begin, end)]

    if first > last:
        return inside(last, start - last * row, stop - last * row)
    whole = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if first < last else []
    head = inside(first - 1, start - (first - 1) * row, row) if start < first * row else []
    return [*head, *whole, *inside(last, 0, stop - last * row)]
