"""The parameters of a built model as a megatron-core ``torch_dist`` checkpoint, and as views to fill in place.

A checkpoint stores *pieces*: named blocks of global tensors. Their keys are those of the bare modules
(``language_model.decoder.layers.0...``, ``modality_submodules.images.encoders.vision...``), whatever wraps them in
memory. Fused tensors are stored by meaning: ``in_proj.weight.query``, or the two halves of ``mlp.linear_fc1``.
"""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from mimo_jobs.checkpoint import torch_dist
from mimo_jobs.errors import UserError
from mimo_jobs.layout import LANGUAGE
from mimo_jobs.modeling.build import IMAGES, BuiltModel, unwrapped
from mimo_jobs.modeling.lora import ADAPTER_PARAMETERS

MODEL_PREFIXES = ("language_model.", f"modality_submodules.{IMAGES}.")


@dataclass(frozen=True)
class StoredPiece:
    """One block of a global tensor, and where it lives on this rank.

    Attributes:
        key: name of the global tensor in a checkpoint.
        global_shape: its shape; the vocabulary axis is rounded up to a multiple of tp.
        global_offset: where the block starts.
        data: the block: a view of the live parameter, in its dtype.
        writes: whether this rank is the one that saves the block; others hold replicas.
        padded: whether the checkpoint's tensor may be longer or shorter than global_shape (vocabulary padding).
    """

    key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    data: Tensor
    writes: bool
    padded: bool


def model_tensors(built: BuiltModel) -> list[StoredPiece]:
    """Every piece that this rank holds; filling ``data`` fills the model."""
    return [
        StoredPiece(
            key=piece.key,
            global_shape=tuple(piece.global_shape),
            global_offset=tuple(piece.global_offset),
            data=_data(piece),
            writes=_is_main_replica(piece),
            padded=bool(piece.allow_shape_mismatch),
        )
        for piece in _sharded_pieces(built)
    ]


def save_model(built: BuiltModel, directory: Path) -> None:
    """Write the parameters to ``directory``, which exists and is empty. Collective over the world.

    megatron-core starts a ``spawn`` process while it writes, so a script that calls this guards ``__main__``.
    """
    dist_checkpointing.save(_by_position(_sharded_pieces(built)), str(directory))
    dist.barrier()


def load_model(built: BuiltModel, directory: Path) -> None:
    """Read the parameters of a checkpoint written under any layout. Collective over the world.

    Rows of padding (vocabulary not divisible by tp) become zero. Optimizer and other state in ``directory`` is ignored.

    Raises:
        UserError: the checkpoint misses tensors of the model, has others, or has them in other shapes.
    """
    pieces = _sharded_pieces(built)
    _check_against(directory, pieces, built.hf.text_config.vocab_size)
    _load(pieces, directory)


def load_adapters(built: BuiltModel, directory: Path) -> None:
    """Read the adapters of a checkpoint that holds nothing else of the model, written under any layout. Collective over the world."""
    _load([piece for piece in _sharded_pieces(built) if _is_adapter(piece.key)], directory)


def _load(pieces: list[ShardedTensor], directory: Path) -> None:
    for piece in pieces:
        if piece.allow_shape_mismatch:
            _data(piece).zero_()
    named = _by_position(pieces)
    loaded: Any = dist_checkpointing.load(dict(named), str(directory))
    for position, piece in named.items():
        if loaded[position].data_ptr() != _data(piece).data_ptr():
            _data(piece).copy_(loaded[position])
    dist.barrier()


def adapter_state(built: BuiltModel) -> dict[str, Any]:
    """Sharded tensors of this rank's adapters alone (`modeling.lora`), for ``dist_checkpointing`` and optimizers.

    ``.data`` are the live parameters, so a distributed optimizer finds its parameters in it; B of a fused layer is a factory.
    """
    return {name: value for name, value in sharded_state(built).items() if name.endswith(ADAPTER_PARAMETERS)}


def adapter_tensors(built: BuiltModel) -> list[StoredPiece]:
    """The pieces of this rank's adapters; filling ``data`` fills them."""
    return [piece for piece in model_tensors(built) if _is_adapter(piece.key)]


def _is_adapter(key: str) -> bool:
    return any(part in key for part in ADAPTER_PARAMETERS)


def sharded_state(built: BuiltModel) -> dict[str, Any]:
    """What megatron-core makes of this rank's modules, before factories; ``.data`` are the live parameters."""
    state: dict = {}
    if built.language is not None:
        metadata = {"dp_cp_group": built.groups[LANGUAGE].dp_cp}
        state |= built.language.sharded_state_dict(prefix=MODEL_PREFIXES[0], metadata=metadata)
    if IMAGES in built.groups:
        images = unwrapped(built.model.modality_submodules[IMAGES])
        state |= images.sharded_state_dict(prefix=MODEL_PREFIXES[1])
    return state


def _sharded_pieces(built: BuiltModel) -> list[ShardedTensor]:
    """This rank's ShardedTensors after all factories, without ``_extra_state`` objects; ``.data`` are views."""
    state = sharded_state(built)
    apply_factories(state)
    pieces = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    for piece in pieces:
        piece.data = _data(piece).detach()
    return pieces


def _data(piece: ShardedTensor) -> Tensor:
    assert piece.data is not None, piece.key
    return piece.data


def _by_position(pieces: list[ShardedTensor]) -> dict[str, ShardedTensor]:
    """Pieces under unique names; what is stored is named by ``piece.key``."""
    return {f"{piece.key}@{piece.global_offset}": piece for piece in pieces}


def _is_main_replica(piece: ShardedTensor) -> bool:
    replica = piece.replica_id
    return replica == 0 if isinstance(replica, int) else not any(replica)


def _stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors in a checkpoint.

    Read as data: a ``.metadata`` that names anything but checkpoint classes is refused here, before megatron-core's own
    loader unpickles it. (``dist_checkpointing.load_tensors_metadata`` also fails on torch 2.15.)
    """
    stored = torch_dist.read_metadata(directory)
    return {key: tensor.shape for key, tensor in stored.items() if key.startswith(MODEL_PREFIXES)}


def _check_against(directory: Path, pieces: list[ShardedTensor], vocab_size: int) -> None:
    """Compare names and shapes with the checkpoint's, over all ranks."""
    local = {piece.key: (tuple(piece.global_shape), bool(piece.allow_shape_mismatch)) for piece in pieces}
    gathered: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    wanted = {key: value for part in gathered for key, value in part.items()}
    stored = _stored_shapes(directory)
    problems = _named("missing", wanted.keys() - stored.keys()) + _named("unexpected", stored.keys() - wanted.keys())
    for key in sorted(wanted.keys() & stored.keys()):
        shape, padded = wanted[key]
        found = stored[key]
        # Padded rows depend on the tp that wrote them; no tp reaches 1024.
        same = found[1:] == shape[1:] and 0 <= found[0] - vocab_size < 1024 if padded else found == shape
        if not same:
            problems.append(f"{key} has shape {list(found)}, the model {list(shape)}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{directory}: does not fit the model: {'; '.join(problems[:8])}{more}")


def _named(what: str, keys: Set[str], most: int = 4) -> list[str]:
    """``["missing a, b, c, d and 7 more"]``, or nothing."""
    if not keys:
        return []
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return [f"{what} {', '.join(sorted(keys)[:most])}{more}"]
