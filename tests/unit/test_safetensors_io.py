"""Damaged and hostile checkpoints are refused with the file, the tensor and the bound; good headers read as they are."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jobs.errors import UserError
from mimo_jobs.weights.safetensors_io import INDEX_NAME, make_header, open_hf, read_shard
from tests.hf_files import make_hf

SHARD = "model-00001-of-00003.safetensors"


def rewrite_header(path, change):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def first(header):
    return next(v for k, v in header.items() if k != "__metadata__")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-100]), [SHARD, "truncated"]),
        (lambda d: (d / SHARD).write_bytes(b"\1\0"), [SHARD, "truncated, or not safetensors"]),
        (lambda d: (d / SHARD).write_bytes(b"\xff" * 64), [SHARD, "header length"]),
        (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes() + b"x"), [SHARD, "1 bytes after the last tensor"]),
        (lambda d: (d / SHARD).unlink(), [INDEX_NAME, SHARD, "missing"]),
        (lambda d: rewrite_header(d / SHARD, lambda h: first(h).update(data_offsets=[0, 1 << 40])), [SHARD, "data_offsets"]),
        (lambda d: rewrite_header(d / SHARD, lambda h: first(h).update(dtype="F99")), [SHARD, "unknown dtype 'F99'"]),
        (lambda d: rewrite_header(d / SHARD, lambda h: first(h).update(shape=[-1])), [SHARD, "damaged header entry"]),
        (lambda d: rewrite_header(d / SHARD, lambda h: first(h).update(data_offsets=[8, 4])), [SHARD, "hold -4 bytes"]),
        (lambda d: rewrite_header(d / SHARD, lambda h: h.pop(next(k for k in h if k != "__metadata__"))), [SHARD]),
        (lambda d: (d / INDEX_NAME).write_text("[]"), [INDEX_NAME, "expected a JSON object, found list"]),
        (lambda d: (d / INDEX_NAME).write_text('{"weight_map": {"a": "../../etc/passwd"}}'), ["../../etc/passwd"]),
        (lambda d: (d / INDEX_NAME).write_text(json.dumps({"weight_map": {"lm_head.weightt": SHARD}})), ["lm_head.weightt"]),
        (lambda d: (d / INDEX_NAME).unlink(), ["neither", "no index that lists them"]),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, damage, said):
    source = make_hf(tmp_path / "hf")
    damage(source)
    with pytest.raises(UserError) as error:
        open_hf(source)
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        open_hf(tmp_path / "nothing")


def test_duplicate_names_are_refused(tmp_path):
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"z")
    with pytest.raises(UserError, match="'a' is listed twice"):
        read_shard(tmp_path / "x.safetensors")


@settings(max_examples=300, deadline=None)
@given(header=st.binary(min_size=0, max_size=200), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_no_bytes_do_worse_than_a_user_error(tmp_path_factory, header, length):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    try:
        read_shard(path)
    except UserError as error:
        assert str(path) in str(error)


def test_headers_are_those_of_the_safetensors_library(tmp_path):
    import torch
    from safetensors.torch import load_file

    header = make_header([("b", "BF16", (2, 3)), ("a", "F32", ()), ("empty", "F16", (0, 4))], {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    loaded = load_file(tmp_path / "x.safetensors")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in loaded.items()} == {
        "b": (torch.bfloat16, (2, 3)), "a": (torch.float32, ()), "empty": (torch.float16, (0, 4)),
    }  # fmt: skip
    assert read_shard(tmp_path / "x.safetensors").metadata == {"format": "pt"}
