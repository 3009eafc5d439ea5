"""Parity of two Hugging Face directories: every tensor's bytes, the index, and the config. No torch."""

import json
import os
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint.manifest import read_config, versions, write_json
from mimo_jobs.conversion import identity
from mimo_jobs.conversion.options import parse_options
from mimo_jobs.errors import JobFailed, UserError
from mimo_jobs.families import family_of
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights import transfer
from mimo_jobs.weights.dtypes import cast_to
from mimo_jobs.weights.safetensors_io import HfCheckpoint, TensorInfo, open_hf

Progress = Callable[[int, int], None]


def verify_hf(
    left: str | Path,
    right: str | Path,
    workers: int | None = None,
    progress: Progress | None = None,
    dtype: str | None = None,
    mtp: str = "keep",
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Compare two checkpoints tensor by tensor, reading both sides on ``workers`` threads.

    Args:
        progress: called with (bytes compared so far, bytes in all).
        dtype: what ``right`` was cast to: ``left`` is cast the same way before it is compared.
        mtp: ``drop`` when ``right`` has none of the tensors that the family passes through.
        only: compare these tensors alone (a part of the work); names missing on a side still count.

    Returns:
        The certificate: ``equal`` (bool), counts, the tensors that differ (with the first differing element, dtypes and
        shapes), those only on one side, and a blake3 digest per tensor.

    Raises:
        UserError: one of the sides is no readable checkpoint.
    """
    from blake3 import blake3

    a, b = open_hf(Path(left).absolute()), open_hf(Path(right).absolute())
    wanted = parse_options(dtype, mtp)
    dropped = _passed_through(a) if mtp == "drop" else []
    common = [n for n in a.tensors if n in b.tensors and (only is None or n in only)]
    total, done = sum(a.tensors[n].nbytes for n in common), 0
    digests: dict[str, str] = {}
    different: dict[str, dict[str, Any]] = {}

    def one(name: str, files: transfer.Files) -> None:
        nonlocal done
        x, y = a.tensors[name], b.tensors[name]
        cast = cast_to(x.dtype, wanted)
        if (wanted if cast else x.dtype, x.shape) != (y.dtype, y.shape):
            different[name] = {"left": f"{x.dtype} {list(x.shape)}", "right": f"{y.dtype} {list(y.shape)}"}
            return
        digest, first = blake3(), None
        fx, fy = files.reader(a.directory / x.file), files.reader(b.directory / y.file)
        for at in range(0, x.nbytes, transfer.BLOCK):
            count = min(transfer.BLOCK, x.nbytes - at)
            start, size = (cast.scaled(at), cast.scaled(count)) if cast else (at, count)
            both = transfer.buffer(count + size)
            transfer.read_full(fx, both[:count], x.offset + at)
            transfer.read_full(fy, both[count:], y.offset + start)
            expected = memoryview(cast(both[:count])).cast("B") if cast else both[:count]
            digest.update(expected)
            if first is None and bytearray(expected) != both[count:]:  # two memoryviews compare 30 times slower
                first = start + next(i for i in range(size) if expected[i] != both[count + i])
            done += count
            if progress:
                progress(done, total)
        digests[name] = digest.hexdigest()
        if first is not None:
            different[name] = {"first_byte": first, "element": first // max(1, y.nbytes // max(1, _count(y)))}

    with transfer.Files() as files:
        ordered = sorted(common, key=lambda n: -a.tensors[n].nbytes)
        transfer.run_all([lambda n=n: one(n, files) for n in ordered], workers or min(8, len(os.sched_getaffinity(0))))
    only_left = sorted(set(a.tensors) - set(b.tensors) - set(dropped))
    only_right = sorted((set(b.tensors) - set(a.tensors)) | (set(b.tensors) & set(dropped)))
    return {
        "format": 1, "kind": "verify", "left": str(a.directory), "right": str(b.directory),
        "equal": not (different or only_left or only_right), "tensors": len(common), "bytes": total,
        "bit_exact": len(common) - len(different), "different": dict(sorted(different.items())),
        "only_left": only_left, "only_right": only_right, "same_files": _same_files(a, b),
        "same_metadata": {n: s.metadata for n, s in a.shards.items()} == {n: s.metadata for n, s in b.shards.items()},
        "same_config": _config(a.directory) == _config(b.directory), "versions": versions(),
        "cast": {"dtype": wanted, "mtp": mtp} if wanted or mtp != "keep" else None,
        "digest": "blake3", "digests": dict(sorted(digests.items())),
    }  # fmt: skip


def certify(
    left: str | Path, right: str | Path, certificate: Path | None, progress: Progress | None = None, dtype: str | None = None,
    mtp: str = "keep",
) -> dict[str, Any]:  # fmt: skip
    """`verify_hf` as a job: writes the certificate, with what was compared, when the two are equal.

    Raises:
        JobFailed: they differ; says in how many tensors and which is the first.
        UserError: one of the sides is no readable checkpoint.
    """
    made_of = identity.of_verify(identity.of_hf(Path(left)), identity.of_hf(Path(right)), dtype, mtp)
    found = verify_hf(left, right, progress=progress, dtype=dtype, mtp=mtp)
    if not found["equal"]:
        names = [*found["different"], *found["only_left"], *found["only_right"]]
        raise JobFailed(
            f"{len(names)} tensors differ, the first is {names[0]}\n"
            f"  nemo-run verify {shlex.quote(str(left))} {shlex.quote(str(right))} shows them"
        )
    if certificate is not None:
        certificate.parent.mkdir(parents=True, exist_ok=True)
        write_json(certificate, found | {"identity": made_of})
    return found


def _passed_through(hf: HfCheckpoint) -> list[str]:
    config = read_config(hf.directory)
    weight_map = family_of(config, hf.directory / "config.json").weight_map(config)
    return plans.match(weight_map, hf.tensors, str(hf.directory)).passed_through


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
