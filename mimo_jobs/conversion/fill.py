"""Hugging Face weights straight into a built model: the plan of an import, with parameters as the target."""

from pathlib import Path

import torch

from mimo_jobs.checkpoint.manifest import read_config
from mimo_jobs.checkpoint.model_io import StoredPiece, model_tensors
from mimo_jobs.errors import UserError
from mimo_jobs.families import family_of
from mimo_jobs.modeling.build import BuiltModel
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights import transfer
from mimo_jobs.weights.dtypes import DTYPES, cast_to, itemsize
from mimo_jobs.weights.rules import stored_rows
from mimo_jobs.weights.safetensors_io import HfCheckpoint, open_hf


def fill_model(built: BuiltModel, model: Path) -> None:
    """Fill this rank's parameters from an HF directory, reading only the slices it holds. No communication.

    A parameter of another dtype is cast; rows of a padded vocabulary become zero. One piece at a time passes through
    host memory.

    Raises:
        UserError: see `safetensors_io.open_hf` and `plan.match`; or the directory is of another model.
    """
    config = read_config(model)
    weight_map = family_of(config, model / "config.json").weight_map(config)
    hf = open_hf(model)
    matched = plans.match(weight_map, hf.tensors, str(model))
    places = {t.name: (r, s) for r, rule in enumerate(weight_map.rules) for s, t in enumerate(rule.stored)}
    with transfer.Files() as files, torch.no_grad():
        for piece in model_tensors(built):
            if piece.key not in places:
                raise UserError(f"{model}: the model has {piece.key}, which the weights of this config do not fill")
            rule, stored = places[piece.key]
            raw = read_box(files, hf, matched, _box(piece, matched, rule, stored))
            values = torch.frombuffer(raw, dtype=getattr(torch, DTYPES[matched.dtypes[rule]][1]))
            piece.data.copy_(values.view(piece.data.shape))


def _box(piece: StoredPiece, matched: plans.Matched, rule: int, stored: int) -> plans.Box:
    tensor = matched.weight_map.rules[rule].stored[stored]
    if tensor.cut is plans.Cut.COLUMNS:
        (row, column), (rows, columns) = piece.global_offset, piece.data.shape
        return plans.Box(rule, stored, row, rows, column, columns, ())
    return plans.Box(rule, stored, piece.global_offset[0], piece.data.shape[0], 0, tensor.row_elements, ())


def read_box(files: transfer.Files, hf: HfCheckpoint, matched: plans.Matched, box: plans.Box) -> bytearray:
    """The bytes of a box of a checkpoint tensor, rows beyond the HF tensor zero, from the HF files."""
    rule, dtype = matched.weight_map.rules[box.rule], matched.dtypes[box.rule]
    tensor, width = rule.stored[box.stored], box.columns * itemsize(dtype)
    raw = bytearray(box.rows * width)
    for run in stored_rows(matched.segments[box.rule], box.stored, box.row, box.row + box.rows):
        info = hf.tensors[rule.hf[run.hf].name]
        size, cast = itemsize(info.dtype), cast_to(info.dtype, dtype)
        row_bytes, part = tensor.row_elements * size, box.columns * size
        source, at = files.reader(hf.directory / info.file), info.offset + run.hf_row * row_bytes
        into = memoryview(raw)[(run.stored_row - box.row) * width :][: run.count * width]
        read = memoryview(bytearray(run.count * part)) if cast else into
        if part == row_bytes:
            transfer.read_full(source, read, at)
        else:
            for i in range(run.count):
                transfer.read_full(source, read[i * part : (i + 1) * part], at + i * row_bytes + box.column * size)
        if cast:
            into[:] = cast(read)
    return raw
