"""The checkpoints on the way: an export reads one as it reads an imported one, and mixed dtypes go on bit for bit."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from mimo_jobs.checkpoint.manifest import read_manifest
from mimo_jobs.checkpoint.torch_dist import read_metadata
from mimo_jobs.conversion.tiny import make_tiny
from mimo_jobs.training.saved import checkpoint_directory, completed
from mimo_jobs.training.tiny_data import make_data
from mimo_jobs.weights.safetensors_io import open_hf
from tests.conversion_ranks import convert, start_worker

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(300)]

ONE: dict[str, Any] = {"language": {}, "images": {}, "world_size": 1}
APART: dict[str, Any] = {"language": {"tp": 2}, "images": {"tp": 2}}
SETTINGS: dict[str, Any] = {  # weights in bf16 with A_log and norms in fp32 beside them, as published
    "steps": 4, "global_batch_size": 4, "micro_batch_size": 4, "precision": "bf16", "recompute": "none", "optimizer": {"lr": 1e-3},
    "saving": {"every": 2}, "dataset": {"workers": 0}, "logging": {"tensorboard": False},
}  # fmt: skip


def train(base: Path, layout: dict[str, Any] = ONE, **changes: Any) -> None:
    settings = SETTINGS | changes
    ranks = start_worker(
        base / "record", "sft", layout, source=base / "hf", data=base / "data", target=base / "sft", **settings
    )
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert {rank.returncode for rank in ranks} == {0}, said[0][-2000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("trained")
    make_tiny(str(base / "hf"))
    make_data(str(base / "data"), samples=16)
    train(base)
    return base


def weights(directory: Path) -> dict[str, bytes]:
    found = {}
    for name, info in open_hf(directory).tensors.items():
        data = (directory / info.file).read_bytes()
        found[name] = data[info.offset : info.offset + info.nbytes]
    return found


def test_an_export_reads_the_checkpoint_of_a_step_without_its_optimizer(trained, tmp_path):
    """After the last step it holds what was published; the step before holds something else."""
    steps = Path(f"{trained}/sft.steps")
    assert [n for n, _ in completed(steps)] == [4, 2]
    last = checkpoint_directory(steps, 4)
    assert [key for key in read_metadata(last) if "optimizer" in key], "what is to be ignored is there"
    for name, source in (("final", trained / "sft"), ("last", last), ("before", checkpoint_directory(steps, 2))):
        summary = convert(tmp_path / f"r-{name}", "export", APART, source=str(source), target=str(tmp_path / name))
        assert summary["tensors"] == len(open_hf(trained / "hf").tensors)
    final, last_written, before, original = (
        weights(p) for p in (tmp_path / "final", tmp_path / "last", tmp_path / "before", trained / "hf")
    )
    assert last_written == final and before != final != original
    assert {n for n in original if n.startswith("mtp.") and final[n] != original[n]} == set()


def test_a_run_of_mixed_dtypes_goes_on_bit_for_bit(trained, tmp_path):
    """megatron-core saves the optimizer's state of one parameter for another where fp32 lies beside bf16."""
    for name in ("hf", "data", "sft.steps"):
        shutil.copytree(trained / name, tmp_path / name, copy_function=shutil.copy2)
    shutil.rmtree(checkpoint_directory(tmp_path / "sft.steps", 4))
    train(tmp_path)
    log = read_manifest(tmp_path / "sft")
    assert log.digests == read_manifest(trained / "sft").digests


def test_every_rank_writes_the_optimizer_state_that_it_owns(tmp_path):
    """Two data parallel ranks: half of the moments each, and megatron-core's names, so that one rank goes on from it."""
    make_tiny(str(tmp_path / "hf"))
    make_data(str(tmp_path / "data"), samples=16)
    train(tmp_path, {"language": {"dp": 2}, "images": {"dp": 2}, "world_size": 2}, micro_batch_size=2)
    stored = read_metadata(checkpoint_directory(Path(f"{tmp_path}/sft.steps"), 4))
    moments, written = [t for key, t in stored.items() if ".optimizer.state.exp_avg." in key], [0, 0]
    for chunk in (c for tensor in moments for c in tensor.chunks):
        written[int(chunk.file[2])] += math.prod(chunk.sizes)  # __RANK_N.distcp
    assert sum(written) == sum(math.prod(t.shape) for t in moments) > 0
    assert abs(written[0] - written[1]) < 0.02 * sum(written)
