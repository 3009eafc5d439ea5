"""Hugging Face checkpoints on disk: headers read and checked without touching a tensor, headers written for new files.

Format: 8 bytes little-endian header length, JSON header ``{name: {dtype, shape, data_offsets}, "__metadata__": {...}}``,
then the data; offsets count from the end of the header (https://huggingface.co/docs/safetensors, "Format").
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UserError, did_you_mean
from mimo_jobs.weights.dtypes import DTYPES, itemsize
from mimo_jobs.weights.json_files import parse_object, read_bytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER = 100_000_000  # the safetensors library's own bound


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of one file. ``offset`` is absolute in the file, in bytes; ``dtype`` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Shard:
    """One ``.safetensors`` file: its raw JSON header (kept byte for byte), tensors, ``__metadata__`` and size."""

    name: str
    header: bytes
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


@dataclass(frozen=True)
class HfCheckpoint:
    """A directory of ``.safetensors`` shards. ``index`` is the raw index file, None for a single unindexed file."""

    directory: Path
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    index: bytes | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def open_hf(directory: Path) -> HfCheckpoint:
    """Read the index and every header of an HF checkpoint; no tensor is read.

    Raises:
        UserError: no checkpoint there, an index naming a missing file or tensor, a tensor the index does not name,
            a damaged header, offsets outside the file, or a truncated file.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such directory; give a directory with config.json and *.safetensors, or a hub id"
        )
    index_path = directory / INDEX_NAME
    if not index_path.exists():
        if not (directory / SINGLE_NAME).exists():
            loose = sorted(p.name for p in directory.glob("*.safetensors"))
            found = f" (found {', '.join(loose[:3])}, but no index that lists them)" if loose else ""
            raise UserError(f"{directory}: neither {INDEX_NAME} nor {SINGLE_NAME} is there{found}")
        shard = read_shard(directory / SINGLE_NAME)
        return HfCheckpoint(directory, {shard.name: shard}, dict(shard.tensors), None)
    raw = read_bytes(index_path)
    weight_map = parse_index(raw, index_path)["weight_map"]
    shards = {}
    for name in dict.fromkeys(weight_map.values()):
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise UserError(f"{index_path}: {name!r} is not the name of a .safetensors file in the same directory")
        if not (directory / name).is_file():
            keys = [k for k, f in weight_map.items() if f == name]
            raise UserError(
                f"{index_path}: names {name}, which is missing ({len(keys)} tensors, e.g. {keys[0]}); "
                "download it again, or remove it from the index"
            )
        shards[name] = read_shard(directory / name)
    tensors = {}
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise UserError(
                f"{index_path}: says {name} is in {file}, whose header does not list it"
                f"{did_you_mean(name, shards[file].tensors)}"
            )
        tensors[name] = shards[file].tensors[name]
    for shard in shards.values():
        if unnamed := sorted(n for n in shard.tensors if weight_map.get(n) != shard.name):
            raise UserError(
                f"{directory / shard.name}: holds {len(unnamed)} tensor(s) that {INDEX_NAME} does not place there, "
                f"e.g. {unnamed[0]}; index and shards are not of one checkpoint"
            )
    return HfCheckpoint(directory, shards, tensors, raw)


def parse_index(raw: bytes, path: Path) -> dict[str, Any]:
    """The index, checked: ``weight_map`` names a file for every tensor. Raises `UserError`."""
    index = parse_object(raw, path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{path}: not a weight index: expected a non-empty weight_map from tensor names to file names")
    if not isinstance(index.get("metadata") or {}, dict):
        raise UserError(f"{path}: metadata is {type(index['metadata']).__name__}, expected a JSON object")
    return index


def read_shard(path: Path) -> Shard:
    """Read and check the header of one ``.safetensors`` file. Raises `UserError` naming the file and the tensor."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: is not a regular file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            length_bytes = file.read(8)
            length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else -1
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise UserError(
                    f"{path}: header length {length} does not fit a file of {size} bytes: truncated, or not safetensors"
                )
            header = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return parse_header(header, path, size)


def parse_header(header: bytes, path: Path, size: int) -> Shard:
    """Check a JSON header against a file of ``size`` bytes; see `read_shard`."""
    entries = parse_object(header, f"{path}: header")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ is no map from names to strings")
    base, tensors = 8 + len(header), {}
    spans = []
    for name, entry in entries.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            assert isinstance(dtype, str)
            assert all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, start, stop))
        except (KeyError, TypeError, ValueError, AssertionError):
            raise UserError(f"{path}: tensor {name}: damaged header entry {entry!r}") from None
        if dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        info = TensorInfo(name, dtype, shape, path.name, base + start)
        if stop - start != info.nbytes:
            raise UserError(
                f"{path}: tensor {name}: data_offsets [{start}, {stop}] hold {stop - start} bytes, but {dtype} "
                f"{list(shape)} needs {info.nbytes}"
            )
        if base + stop > size:
            raise UserError(
                f"{path}: tensor {name} ends at byte {base + stop}, but the file has {size}: truncated? download it again"
            )
        tensors[name] = info
        spans.append((start, stop, name))
    at = 0
    for start, stop, name in sorted(spans):
        if start != at:
            what = "overlaps the tensor before it" if start < at else f"leaves {start - at} bytes unused before it"
            raise UserError(f"{path}: tensor {name}: data_offsets [{start}, {stop}] {what}")
        at = stop
    if base + at != size:
        raise UserError(f"{path}: {size - base - at} bytes after the last tensor that no tensor owns")
    return Shard(path.name, header, tensors, metadata, size)


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The JSON header of a new file holding (name, dtype, shape) in that order, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        stop = at + math.prod(shape) * itemsize(dtype)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return raw + b" " * (-len(raw) % 8)


def new_shard(directory: Path, name: str, header: bytes) -> Shard:
    """The shard that a header describes, before its file exists."""
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    data = max((e["data_offsets"][1] for e in entries.values()), default=0)
    return parse_header(header, directory / name, 8 + len(header) + data)
