"""Parity of two Hugging Face directories: every tensor's bytes, the index, and the config. No torch."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint.manifest import versions
from mimo_jobs.errors import UserError
from mimo_jobs.weights import transfer
from mimo_jobs.weights.safetensors_io import HfCheckpoint, TensorInfo, open_hf

Progress = Callable[[int, int], None]


def verify_hf(
    left: str | Path, right: str | Path, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Compare two checkpoints tensor by tensor, reading both sides on ``workers`` threads.

    Args:
        progress: called with (bytes compared so far, bytes in all).

    Returns:
        The certificate: ``equal`` (bool), counts, the tensors that differ (with the first differing element, dtypes and
        shapes), those only on one side, and a blake3 digest per tensor.

    Raises:
        UserError: one of the sides is no readable checkpoint.
    """
    from blake3 import blake3

    a, b = open_hf(Path(left).absolute()), open_hf(Path(right).absolute())
    common = [n for n in a.tensors if n in b.tensors]
    total, done = sum(a.tensors[n].nbytes for n in common), 0
    digests: dict[str, str] = {}
    different: dict[str, dict[str, Any]] = {}

    def one(name: str, files: transfer.Files) -> None:
        nonlocal done
        x, y = a.tensors[name], b.tensors[name]
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            different[name] = {"left": f"{x.dtype} {list(x.shape)}", "right": f"{y.dtype} {list(y.shape)}"}
            return
        digest, first = blake3(), None
        fx, fy = files.reader(a.directory / x.file), files.reader(b.directory / y.file)
        for at in range(0, x.nbytes, transfer.BLOCK):
            count = min(transfer.BLOCK, x.nbytes - at)
            both = transfer.buffer(2 * count)
            transfer.read_full(fx, both[:count], x.offset + at)
            transfer.read_full(fy, both[count:], y.offset + at)
            digest.update(both[:count])
            if first is None and both[:count] != both[count:]:
                first = at + next(i for i in range(count) if both[i] != both[count + i])
            done += count
            if progress:
                progress(done, total)
        digests[name] = digest.hexdigest()
        if first is not None:
            different[name] = {"first_byte": first, "element": first // max(1, x.nbytes // max(1, _count(x)))}

    with transfer.Files() as files:
        ordered = sorted(common, key=lambda n: -a.tensors[n].nbytes)
        transfer.run_all([lambda n=n: one(n, files) for n in ordered], workers or min(8, len(os.sched_getaffinity(0))))
    only_left, only_right = sorted(set(a.tensors) - set(b.tensors)), sorted(set(b.tensors) - set(a.tensors))
    return {
        "format": 1, "kind": "verify", "left": str(a.directory), "right": str(b.directory),
        "equal": not (different or only_left or only_right), "tensors": len(common), "bytes": total,
        "bit_exact": len(common) - len(different), "different": dict(sorted(different.items())),
        "only_left": only_left, "only_right": only_right, "same_files": _same_files(a, b),
        "same_metadata": {n: s.metadata for n, s in a.shards.items()} == {n: s.metadata for n, s in b.shards.items()},
        "same_config": _config(a.directory) == _config(b.directory), "versions": versions(),
        "digest": "blake3", "digests": dict(sorted(digests.items())),
    }  # fmt: skip


def _count(info: TensorInfo) -> int:
    count = 1
    for n in info.shape:
        count *= n
    return count


def _same_files(a: HfCheckpoint, b: HfCheckpoint) -> bool:
    """The same tensors in the same files."""
    return {n: t.file for n, t in a.tensors.items()} == {n: t.file for n, t in b.tensors.items()}


def _config(directory: Path) -> Any:
    try:
        return json.loads((directory / "config.json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'}: damaged: {error}") from None
