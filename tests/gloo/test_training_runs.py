"""Whole runs as users start them: worker processes that train, are killed, go on, and publish what transformers loads."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mimo_jobs.checkpoint.manifest import read_manifest
from mimo_jobs.conversion.tiny import make_tiny
from mimo_jobs.training import history
from mimo_jobs.training.saved import completed, read
from tests.conversion_ranks import result
from tests.gloo.forked import ForkedRank, start_forked
from tests.gloo.images import write_data

pytestmark = pytest.mark.gloo

FAN_IN = {"language": {"tp": 2}, "images": {"dp": 2, "rank_offset": 0}, "world_size": 2}
DISJOINT = {"language": {"pp": 2}, "images": {"rank_offset": 2}, "world_size": 3}
SETTINGS: dict[str, Any] = {
    "steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "recompute": "none",
    "optimizer": {"lr": 1e-4, "warmup_steps": 2}, "saving": {"every": 2}, "dataset": {"workers": 0},
    "logging": {"tensorboard": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    make_tiny(str(path))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 24)


def start(record: Path, layout: dict, **arguments: Any) -> list[ForkedRank]:
    return start_forked(record, arguments.pop("job", "sft"), layout, **(SETTINGS | arguments))


def end(ranks: list[ForkedRank], timeout: float = 150) -> tuple[list[int], str]:
    """Exit codes, and what the ranks said last."""
    said = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], "\n".join(s[-1500:] for s in said)


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    base = tmp_path_factory.mktemp("whole")
    codes, said = end(start(base / "record", FAN_IN, source=model, data=data, target=base / "sft"))
    assert codes == [0, 0], said
    return base


def test_a_run_publishes_a_checkpoint_and_its_history(whole: Path) -> None:
    summary = result(whole / "record")["summary"]
    assert summary["steps"] == 8 and summary["loss"] < summary["first_loss"]
    assert set(read_manifest(whole / "sft").digests) and read_manifest(whole / "sft").identity["job"] == "sft"
    assert [step for step, _ in completed(Path(f"{whole}/sft.steps"))] == [8, 6]
    told = history.read(whole / "record")
    assert list(told.steps) == list(range(1, 9))
    assert all(told.steps[n]["samples"] == 4 for n in told.steps)


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    seed: int, model: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    choose = random.Random(seed)
    arguments: dict[str, Any] = dict(source=model, data=data, target=tmp_path / "sft")
    ranks = start(tmp_path / "record", FAN_IN, **arguments)
    _wait_for_step(tmp_path / "record", choose.choice([3, 5]))
    time.sleep(choose.random() * 0.3)
    victim = choose.choice(ranks)
    victim.kill()
    codes, said = end(ranks)
    assert 0 not in codes, said
    assert result(tmp_path / "record")["error"]["transient"]
    saved = completed(Path(f"{tmp_path}/sft.steps"))
    assert saved and read(saved[0][1]).step >= 2
    ranks = start(tmp_path / "record", FAN_IN, **arguments)
    codes, said = end(ranks)
    assert codes == [0, 0], said
    assert read_manifest(tmp_path / "sft").digests == read_manifest(whole / "sft").digests
    told = history.read(tmp_path / "record")
    before = history.read(whole / "record")
    assert {n: v["loss"] for n, v in told.steps.items()} == {n: v["loss"] for n, v in before.steps.items()}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_a_later_start_goes_on_from_there(
    signum: signal.Signals, model: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = dict(source=model, data=data, target=tmp_path / "sft", saving={"every": 0})
    ranks = start(tmp_path / "record", FAN_IN, **arguments)
    _wait_for_step(tmp_path / "record", 3)
    ranks[1].send_signal(signum)  # one rank hears of it, all stop
    codes, said = end(ranks)
    assert codes == [1, 1], said
    assert result(tmp_path / "record")["error"]["message"] == "interrupted"
    assert result(tmp_path / "record")["error"]["transient"]
    (step, _), *_ = completed(Path(f"{tmp_path}/sft.steps"))
    assert 3 <= step < 8
    codes, said = end(start(tmp_path / "record", FAN_IN, **arguments))
    assert codes == [0, 0], said
    assert history.read(tmp_path / "record").resumed == [step]
    assert read_manifest(tmp_path / "sft").digests == read_manifest(whole / "sft").digests


def test_a_damaged_checkpoint_is_passed_over_and_named(model: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(source=model, data=data, target=tmp_path / "sft")
    ranks = start(tmp_path / "record", DISJOINT, **arguments)
    _wait_for_checkpoint(Path(f"{tmp_path}/sft.steps"), 4)
    for rank in ranks:
        rank.kill()
    end(ranks)
    newest = completed(Path(f"{tmp_path}/sft.steps"))[0][1]
    file = next(newest.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 7)
    ranks = start_worker_with_output(tmp_path / "record", FAN_IN, **arguments)
    codes, said = end(ranks)
    assert codes == [0, 0], said
    assert "not a whole checkpoint; the one before it is used" in ranks_output(tmp_path)
    # Another layout before the kill: the same to rounding.
    told, before = history.read(tmp_path / "record"), history.read(whole / "record")
    assert [v["loss"] for v in told.steps.values()] == pytest.approx([v["loss"] for v in before.steps.values()], rel=1e-4)


def start_worker_with_output(record: Path, layout: dict, **arguments: Any) -> list[ForkedRank]:
    os.environ["MIMO_JOBS_LOGS"] = str(record.parent)
    try:
        return start(record, layout, **arguments)
    finally:
        del os.environ["MIMO_JOBS_LOGS"]


def ranks_output(directory: Path) -> str:
    return "\n".join(p.read_text() for p in directory.glob("*.log"))


def _wait_for_step(record: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        file = record / history.FILE
        if file.exists() and any(json.loads(line).get("step", 0) >= step for line in file.read_text().splitlines()[:-1]):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {timeout:g} s")


def _wait_for_checkpoint(root: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not any(s >= step for s, _ in completed(root)):
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {timeout:g} s"
        time.sleep(0.05)
