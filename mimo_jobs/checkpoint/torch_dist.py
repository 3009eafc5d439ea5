"""The ``torch_dist`` format of megatron-core, written from a plan and read as data. No torch, and no pickle is executed.

A checkpoint is a directory with ``.metadata`` (a pickled ``torch.distributed.checkpoint.metadata.Metadata``),
``metadata.json`` (megatron-core's format tag) and ``*.distcp`` files that hold one ``torch.save`` archive a chunk
(torch/distributed/checkpoint/filesystem.py, megatron/core/dist_checkpointing/strategies/torch.py). An archive is an
uncompressed zip whose ``data/0`` record is the chunk's raw bytes, so a chunk's bytes lie at a place known in advance:
every rank can write, and read, just its own.
"""

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint import inert_pickle as ip
from mimo_jobs.errors import UserError
from mimo_jobs.weights.dtypes import DTYPES, FROM_TORCH, itemsize

METADATA_NAME = ".metadata"
FORMAT_NAME = "metadata.json"
FORMAT_JSON = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
ALIGNMENT = 64  # torch.save's storage alignment
COMMON_KEY = "common_state/shard_0_1"  # ShardedObject("common_state", None, (1,), (0,)).unique_key

_STORAGE = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}  # fmt: skip
_LINEAR = re.compile(r"(.+\.(?:linear_(?:fc1|fc2|qkv|proj)|in_proj|out_proj))\.weight")
_DCP = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the archive that holds it: ``file`` is relative, ``offset`` and ``length`` in bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass
class StoredTensor:
    """A tensor of the checkpoint: global shape, safetensors dtype name, and its chunks."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- one chunk's archive


@lru_cache(maxsize=4096)
def frame(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Bytes before and after the raw data of a ``torch.save`` archive of a contiguous tensor.

    The data starts at ``len(prefix)``, a multiple of `ALIGNMENT`. The record's CRC is 0: torch's reader does not check
    it (``torch.serialization.set_crc32_options``), the digests of the manifest guard the bytes instead.
    """
    count = math.prod(shape)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    storage = ip.Persistent(("storage", ip.Global("torch", _STORAGE[dtype]), "0", "cpu", count))
    ordered = ip.Call(ip.Global("collections", "OrderedDict"), ())
    tensor = ip.Call(ip.Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, ordered))
    return _archive([("data.pkl", ip.dumps(tensor)), ("byteorder", b"little")], count * itemsize(dtype))


def object_archive(value: dict | None) -> bytes:
    """The archive of a ShardedObject: a list of one value, the common state (``{}``) or an extra state (``None``)."""
    prefix, suffix = _archive([("data.pkl", ip.dumps([value])), ("byteorder", b"little")], None)
    return prefix + suffix


def extra_state_keys(keys: Iterable[str]) -> list[str]:
    """The ``_extra_state`` objects of megatron-core's parallel linear layers (tensor_parallel/layers.py), which a stock
    ``sharded_state_dict`` asks for although they hold nothing; from the keys of the tensors."""
    modules = (_LINEAR.match(key) for key in keys)
    return list(dict.fromkeys(f"{found[1]}._extra_state/shard_0_1" for found in modules if found))


def _archive(records: list[tuple[str, bytes]], data_bytes: int | None) -> tuple[bytes, bytes]:
    """Zip bytes around a ``data/0`` record of ``data_bytes`` (None: no such record), stored, zip64 where needed."""
    import zlib

    before, central, entries = bytearray(), bytearray(), 0

    def add(name: str, crc: int, size: int, at: int, align: bool) -> bytes:
        nonlocal entries
        raw, big = f"archive/{name}".encode(), size >= 0xFFFFFFFF
        short = 0xFFFFFFFF if big else size
        extra = struct.pack("<HHQQ", 1, 16, size, size) if big else b""
        if align:  # "FB" is the padding field that torch.save uses
            pad = -(at + 30 + len(raw) + len(extra) + 4) % ALIGNMENT
            extra += struct.pack("<HH", 0x4246, pad) + b"Z" * pad
        fixed = (0, 0x0808, 0, 0, 0, crc, short, short, len(raw))
        sizes64 = struct.pack("<QQ", size, size) if big else b""
        far = at >= 0xFFFFFFFF
        extra64 = sizes64 + (struct.pack("<Q", at) if far else b"")
        if extra64:
            extra64 = struct.pack("<HH", 1, len(extra64)) + extra64
        central.extend(
            struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0, *fixed[:5], *fixed[5:8], len(raw), len(extra64), 0, 0, 0, 0,
                        0xFFFFFFFF if far else at) + raw + extra64
        )  # fmt: skip
        entries += 1
        return struct.pack("<4s5H3L2H", b"PK\x03\x04", *fixed, len(extra)) + raw + extra

    for name, data in records:
        before += add(name, zlib.crc32(data), len(data), len(before), False) + data
    after = bytearray()
    if data_bytes is not None:
        before += add("data/0", 0, data_bytes, len(before), True)
    at = len(before) + (data_bytes or 0)
    after += add("version", zlib.crc32(b"3\n"), 2, at, False) + b"3\n"
    start = at + len(after)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, len(central), start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(central), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries, entries, len(central), min(start, 0xFFFFFFFF), 0)
    return bytes(before), bytes(after + central + end64 + locator + end)


def data_offset(fd: int, path: Path | str, tensor: StoredTensor, chunk: Chunk) -> int:
    """Absolute offset of a chunk's raw bytes in its file.

    Raises:
        UserError: the file is truncated, or the archive is not that of a contiguous uncompressed tensor of this
            dtype and shape.
    """
    prefix, suffix = frame(tensor.dtype, chunk.sizes)
    nbytes = math.prod(chunk.sizes) * itemsize(tensor.dtype)
    size = os.fstat(fd).st_size
    if chunk.offset + chunk.length > size:
        raise UserError(
            f"{path}: holds {size} bytes, but {METADATA_NAME} places {tensor.key} at {chunk.offset} to "
            f"{chunk.offset + chunk.length}: truncated"
        )
    if len(prefix) + nbytes + len(suffix) == chunk.length and os.pread(fd, len(prefix), chunk.offset) == prefix:
        return chunk.offset + len(prefix)
    return chunk.offset + _parse_archive(fd, path, tensor, chunk, nbytes)


def _parse_archive(fd: int, path: Path | str, tensor: StoredTensor, chunk: Chunk, nbytes: int) -> int:
    """Offset of ``data/0`` in an archive that another writer made (torch.save)."""
    what = f"{path}: {tensor.key} at byte {chunk.offset}"
    try:
        with zipfile.ZipFile(_View(fd, chunk.offset, chunk.length)) as archive:
            names = {n.split("/", 1)[-1]: n for n in archive.namelist()}
            dtype, shape, strides, start, key = _read_tensor_pickle(archive.read(names["data.pkl"]), what)
            record = archive.getinfo(names[f"data/{key}"])
            order = archive.read(names["byteorder"]) if "byteorder" in names else b"little"
    except (zipfile.BadZipFile, KeyError, struct.error, EOFError) as error:
        raise UserError(f"{what}: not a torch.save archive: {error}") from None
    expected = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    contiguous = all(a == b for a, b, n in zip(strides, expected, shape, strict=True) if n > 1)
    if dtype != tensor.dtype or shape != chunk.sizes or not contiguous or record.compress_type or order != b"little":
        raise UserError(
            f"{what}: holds {dtype} {list(shape)} with strides {list(strides)}; expected contiguous {tensor.dtype} "
            f"{list(chunk.sizes)}"
        )
    local = os.pread(fd, 30, chunk.offset + record.header_offset)
    name_length, extra_length = struct.unpack("<2H", local[26:30])
    first = start * itemsize(dtype)
    if first + nbytes > record.file_size:
        raise UserError(f"{what}: its storage has {record.file_size} bytes, {first + nbytes} are needed")
    return record.header_offset + 30 + name_length + extra_length + first


def _read_tensor_pickle(raw: bytes, what: str) -> tuple[str, tuple[int, ...], tuple[int, ...], int, str]:
    value = ip.loads(raw, lambda module, _: module in {"torch", "torch._utils", "collections"}, what)
    try:
        if value.function.name == "_rebuild_parameter":
            value = value.args[0]
        assert value.function.name == "_rebuild_tensor_v2"
        storage, start, shape, strides = value.args[:4]
        _, kind, key, _, _ = storage.value
        dtype = next(d for d, s in _STORAGE.items() if s == kind.name)
        return dtype, tuple(shape), tuple(strides), start, key
    except (AssertionError, ValueError, AttributeError, StopIteration):
        raise UserError(f"{what}: not the archive of a plain tensor") from None


class _View(io.RawIOBase):
    """A read-only window of a file, for zipfile."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd, self._start, self._length, self._at = fd, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        data = os.pread(self._fd, left if size is None or size < 0 else min(size, left), self._start + self._at)
        self._at += len(data)
        return data


# ------------------------------------------------------------------------------------------------------- .metadata


def encode_metadata(tensors: Iterable[StoredTensor], objects: Mapping[str, Chunk]) -> bytes:
    """The bytes of ``.metadata`` for tensors and byte objects (key -> where its archive lies)."""

    def size(values: tuple[int, ...]) -> ip.Call:
        return ip.Call(ip.Global("torch", "Size"), (values,))

    layout = ip.Call(ip.Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = ip.Call(ip.Global(_DCP, "_MEM_FORMAT_ENCODING"), (0,))
    state: dict[str, Any] = {}
    storage: list[tuple[Any, Any]] = []

    def place(key: str, chunk: Chunk, offset: Any, index: int | None) -> None:
        where = {"relative_path": chunk.file, "offset": chunk.offset, "length": chunk.length}
        at = ip.Object(ip.Global(_DCP, "MetadataIndex"), {"fqn": key, "offset": offset, "index": index})
        storage.append((at, ip.Object(ip.Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), where)))

    for tensor in tensors:
        dtype = ip.Global("torch", DTYPES[tensor.dtype][1])
        # Five fields: torch 2.15 adds strides, which older versions refuse and newer ones do without.
        properties = ip.Object(ip.Global(_DCP, "TensorProperties"), (dtype, layout, False, contiguous, False))
        boxes = [
            ip.Object(
                ip.Global(_DCP, "ChunkStorageMetadata"), {"offsets": size(chunk.offsets), "sizes": size(chunk.sizes)}
            )
            for chunk in tensor.chunks
        ]
        state[tensor.key] = ip.Object(
            ip.Global(_DCP, "TensorStorageMetadata"),
            {"properties": properties, "size": size(tensor.shape), "chunks": boxes},
        )
        for index, chunk in enumerate(tensor.chunks):
            place(tensor.key, chunk, size(chunk.offsets), index)
    for key, chunk in objects.items():
        state[key] = ip.Object(ip.Global(_DCP, "BytesStorageMetadata"), {})
        place(key, chunk, None, None)
    return ip.dumps(
        ip.Object(
            ip.Global(_DCP, "Metadata"),
            {
                "state_dict_metadata": state, "planner_data": {}, "storage_data": ip.Items(storage),
                "storage_meta": None, "version": "1.0.0",
            },
        )
    )  # fmt: skip


_PACKAGES = (
    "torch.distributed.checkpoint.",
    "torch.distributed._shard.",
    "megatron.core.dist_checkpointing.",
    "nvidia_resiliency_ext.",
    "pathlib",
)
_NAMES = {
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("collections", "defaultdict"), *(("torch", name) for name in FROM_TORCH),
}  # fmt: skip


def _metadata_name(module: str, name: str) -> bool:
    """Names that a ``.metadata`` has; megatron-core also stores its save plan."""
    return (module, name) in _NAMES or f"{module}.".startswith(_PACKAGES)


def read_metadata(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a torch_dist checkpoint, keys without the ``module.`` levels of DDP wrappers.

    Raises:
        UserError: no checkpoint, a damaged or foreign ``.metadata`` (nothing in it is ever executed).
    """
    path = directory / METADATA_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}: not a torch_dist checkpoint, or incomplete"
        ) from None
    value = ip.loads(raw, _metadata_name, str(path))
    found: dict[str, StoredTensor] = {}
    try:
        assert value.cls.name == "Metadata"
        for key, entry in value.state["state_dict_metadata"].items():
            if entry.cls.name != "TensorStorageMetadata":
                continue
            dtype = FROM_TORCH[entry.state["properties"].state[0].name]
            found[key] = StoredTensor(key, dtype, tuple(entry.state["size"].args[0]))
        for at, info in value.state["storage_data"].items():
            key, offset = at.state["fqn"], at.state.get("offset")
            if key not in found or offset is None:
                continue
            sizes = next(
                c.state["sizes"].args[0]
                for c in _boxes(value, key)
                if tuple(c.state["offsets"].args[0]) == tuple(offset.args[0])
            )
            where = info.state
            name = where["relative_path"]
            assert isinstance(name, str) and name == os.path.basename(name), f"file name {name!r}"
            found[key].chunks.append(Chunk(tuple(offset.args[0]), tuple(sizes), name, where["offset"], where["length"]))
    except (AssertionError, KeyError, AttributeError, TypeError, IndexError, StopIteration) as error:
        raise UserError(f"{path}: not the metadata of a torch_dist checkpoint: {error!r}") from None
    for tensor in found.values():
        held = sum(math.prod(c.sizes) for c in tensor.chunks)
        if held < math.prod(tensor.shape):
            raise UserError(
                f"{path}: {tensor.key} has {held} of {math.prod(tensor.shape)} elements stored: an incomplete checkpoint"
            )
    return {_unwrapped(k): t for k, t in found.items()}


def _boxes(metadata: Any, key: str) -> list[Any]:
    return metadata.state["state_dict_metadata"][key].state["chunks"]


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "module")
