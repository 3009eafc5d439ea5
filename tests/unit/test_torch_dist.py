"""The files we write are read by torch as it reads its own, and torch's are read by us; no pickle is executed."""

import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from mimo_jobs.checkpoint import inert_pickle as ip
from mimo_jobs.checkpoint import torch_dist as td
from mimo_jobs.errors import UserError
from mimo_jobs.weights.dtypes import DTYPES, itemsize

DTYPE_NAMES = ["F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 1, 4), (1, 1)])
def test_an_archive_is_what_torch_load_expects(dtype, shape):
    count = torch.Size(shape).numel()
    data = bytes([1, 0] * (count * itemsize(dtype)))[: count * itemsize(dtype)]
    prefix, suffix = td.frame(dtype, shape)
    assert len(prefix) % td.ALIGNMENT == 0
    tensor = torch.load(io.BytesIO(prefix + data + suffix), weights_only=True)
    assert tensor.dtype == getattr(torch, DTYPES[dtype][1]) and tuple(tensor.shape) == shape
    assert bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) == data


def test_records_over_4_gib_use_zip64():
    """Sizes only: the central directory of a 5 GiB record, its data a hole."""
    import zipfile

    prefix, suffix = td.frame("U8", (5 << 30,))

    class Sparse(io.RawIOBase):
        at, length = 0, len(prefix) + (5 << 30) + len(suffix)

        def seekable(self):
            return True

        def seek(self, offset, whence=0):
            self.at = offset + (0, self.at, self.length)[whence]
            return self.at

        def tell(self):
            return self.at

        def read(self, n=-1):
            n = self.length - self.at if n < 0 else n
            start, self.at = self.at, self.at + n
            tail = start - len(prefix) - (5 << 30)
            return suffix[tail : tail + n] if tail >= 0 else prefix[start : start + n]

    info = zipfile.ZipFile(Sparse()).getinfo("archive/data/0")  # type: ignore[arg-type]
    assert info.file_size == 5 << 30


def write(directory, tensors):
    """A two-chunk-a-tensor checkpoint of given torch tensors, by our writer."""
    directory.mkdir()
    stored, blob = [], b""
    for key, tensor in tensors.items():
        dtype = next(n for n, (_, t) in DTYPES.items() if getattr(torch, t) == tensor.dtype)
        made = td.StoredTensor(key, dtype, tuple(tensor.shape))
        for part, row in ((tensor[:1], 0), (tensor[1:], 1)):
            if not len(part):
                continue
            prefix, suffix = td.frame(dtype, tuple(part.shape))
            raw = bytes(part.contiguous().view(-1).view(torch.uint8).numpy())
            at, item = len(blob), prefix + raw + suffix
            blob += item
            made.chunks.append(
                td.Chunk((row, *[0] * (tensor.ndim - 1)), tuple(part.shape), "__0_0.distcp", at, len(item))
            )
        stored.append(made)
    common = td.object_archive({})
    place = td.Chunk((), (), "__0_0.distcp", len(blob), len(common))
    (directory / "__0_0.distcp").write_bytes(blob + common)
    (directory / ".metadata").write_bytes(td.encode_metadata(stored, {td.COMMON_KEY: place}))
    return stored


TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).view(4, 3), "b": torch.tensor([1.5, -0.0, float("nan")]),
    "c": torch.arange(8, dtype=torch.int64).view(2, 1, 4),
}  # fmt: skip


def test_torch_reads_what_we_write(tmp_path):
    write(tmp_path / "ours", TENSORS)
    into = {k: torch.empty_like(t) for k, t in TENSORS.items()}
    dcp.load(into, storage_reader=FileSystemReader(tmp_path / "ours"), no_dist=True)
    for key, tensor in TENSORS.items():
        assert torch.equal(into[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_our_metadata_equals_torchs_own(tmp_path):
    write(tmp_path / "ours", TENSORS)
    dcp.save(dict(TENSORS), checkpoint_id=tmp_path / "theirs", no_dist=True)
    ours = FileSystemReader(tmp_path / "ours").read_metadata().state_dict_metadata
    theirs = FileSystemReader(tmp_path / "theirs").read_metadata().state_dict_metadata
    for key in TENSORS:
        a, b = ours[key], theirs[key]
        assert (a.size, a.properties.dtype, a.properties.layout) == (b.size, b.properties.dtype, b.properties.layout)
        assert a.properties.memory_format == b.properties.memory_format and type(a.size) is type(b.size)


def test_we_read_what_torch_writes_and_drop_wrapper_levels(tmp_path):
    dcp.save(
        {"module.x.module.y": TENSORS["a.weight"], "n": {"step": 3}}, checkpoint_id=tmp_path / "theirs", no_dist=True
    )
    found = td.read_metadata(tmp_path / "theirs")
    assert list(found) == ["x.y"] and found["x.y"].shape == (4, 3) and found["x.y"].dtype == "BF16"
    (chunk,) = found["x.y"].chunks
    path = tmp_path / "theirs" / chunk.file
    with open(path, "rb") as file:
        at = td.data_offset(file.fileno(), path, found["x.y"], chunk)
        raw = os.pread(file.fileno(), 24, at)
    assert raw == bytes(TENSORS["a.weight"].view(torch.uint8).numpy())


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/mimo_jobs_pwned",))


def test_a_hostile_pickle_is_refused_and_never_run(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(UserError, match=r"refers to posix\.system"):
        td.read_metadata(tmp_path)
    # Also a name that is expected is only recorded, not called.
    value = ip.loads(pickle.dumps(Bomb()), lambda *_: True, "x")
    assert value.function.name == "system" and not os.path.exists("/tmp/mimo_jobs_pwned")


@pytest.mark.parametrize("cut", [1, 10, 100, 400])
def test_a_cut_metadata_file_is_named(tmp_path, cut):
    write(tmp_path / "ours", TENSORS)
    raw = (tmp_path / "ours/.metadata").read_bytes()
    (tmp_path / "ours/.metadata").write_bytes(raw[:-cut])
    with pytest.raises(UserError, match=r"\.metadata"):
        td.read_metadata(tmp_path / "ours")


def test_missing_chunks_are_found(tmp_path):
    stored = write(tmp_path / "ours", TENSORS)
    stored[0].chunks.pop()
    (tmp_path / "ours/.metadata").write_bytes(td.encode_metadata(stored, {}))
    with pytest.raises(UserError, match=r"a\.weight has 3 of 12 elements"):
        td.read_metadata(tmp_path / "ours")


@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, 255, 256, -1, 2**31, -(2**40), 2**70, "ä\n'", (), (1, "a"), [], [[1], {"k": (2,)}], {}],
)
def test_pickles_we_write_are_read_by_python(value):
    assert pickle.loads(ip.dumps(value)) == value
