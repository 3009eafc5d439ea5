"""Runs that are killed, signalled or damaged, and go on: what they publish is what an undisturbed run publishes."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimo_jobs.checkpoint.manifest import read_manifest
from mimo_jobs.conversion.tiny import make_tiny
from mimo_jobs.training import history, loop
from mimo_jobs.training.metrics import Metrics
from mimo_jobs.training.saved import completed, read
from tests.gloo.images import write_data
from tests.gloo.jobs import DISJOINT_PP, FAN_IN, ONE, Job, run_job

pytestmark = pytest.mark.gloo

SETTINGS: dict[str, Any] = {
    "steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "recompute": "none",
    "optimizer": {"lr": 1e-4, "warmup_steps": 2}, "saving": {"every": 2}, "dataset": {"workers": 0},
    "logging": {"tensorboard": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model and data, as arguments."""
    base = tmp_path_factory.mktemp("inputs")
    make_tiny(str(base / "hf"))
    return SETTINGS | {"source": base / "hf", "data": write_data(base / "data", 24)}


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    base = tmp_path_factory.mktemp("whole")
    ended = run_job(base / "record", "sft", FAN_IN, **inputs, target=base / "sft", timeout=150)
    assert ended.summary["steps"] == 8
    return base


def test_a_run_publishes_a_checkpoint_and_its_history(whole: Path) -> None:
    summary = json.loads((whole / "record" / "result.json").read_text())["summary"]
    assert summary["loss"] < summary["first_loss"]
    assert set(read_manifest(whole / "sft").digests) and read_manifest(whole / "sft").identity["job"] == "sft"
    assert [step for step, _ in completed(Path(f"{whole}/sft.steps"))] == [8, 6]
    told = _history(whole)
    assert list(told.steps) == list(range(1, 9))
    assert all(told.steps[n]["samples"] == 4 for n in told.steps)


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    seed: int, inputs: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    choose = random.Random(seed)
    arguments = inputs | {"target": tmp_path / "sft"}
    with Job(tmp_path / "record", "sft", FAN_IN, **arguments) as job:
        steps = Path(f"{tmp_path}/sft.steps")
        job.wait_until(_step_is_reached(tmp_path, choose.choice([3, 5])), timeout=150)
        job.wait_until(lambda: bool(completed(steps)), timeout=150)  # it is published while later steps run
        published = completed(steps)[0][0]
        time.sleep(choose.random() * 0.3)
        job.kill(choose.randrange(2))
        ended = job.end()
    assert 0 not in ended.codes and ended.error["transient"], ended.said
    assert read(completed(steps)[0][1]).step >= published >= 2
    assert run_job(tmp_path / "record", "sft", FAN_IN, **arguments, timeout=150).summary["steps"] == 8
    assert read_manifest(tmp_path / "sft").digests == read_manifest(whole / "sft").digests
    assert _losses(tmp_path) == _losses(whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_a_later_start_goes_on_from_there(
    signum: signal.Signals, inputs: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    arguments = inputs | {"target": tmp_path / "sft", "saving": {"every": 0}}
    with Job(tmp_path / "record", "sft", FAN_IN, **arguments) as job:
        job.wait_until(_step_is_reached(tmp_path, 3), timeout=150)
        job.kill(1, signum)  # one rank hears of it, all stop
        ended = job.end()
    assert ended.codes == [1, 1], ended.said
    assert ended.error["message"] == "interrupted" and ended.error["transient"]
    (step, _), *_ = completed(Path(f"{tmp_path}/sft.steps"))
    assert 3 <= step < 8
    assert run_job(tmp_path / "record", "sft", FAN_IN, **arguments, timeout=150).summary["steps"] == 8
    assert _history(tmp_path).resumed == [step]
    assert read_manifest(tmp_path / "sft").digests == read_manifest(whole / "sft").digests


def test_a_run_that_is_stopped_before_its_next_step_keeps_what_it_has(
    inputs: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Fresh, and gone on from a checkpoint: none is written, none touched."""
    arguments = inputs | {"target": tmp_path / "sft", "saving": {"every": 0}}
    steps = Path(f"{tmp_path}/sft.steps")

    def stop(after: int) -> Callable[[int], None]:
        """Have rank 0 hear SIGTERM when it has taken the samples of a step, ``after`` others."""

        def before(rank: int) -> None:
            take, taken = loop._next, []

            def taking(given: Any) -> Any:
                found = take(given)
                taken.append(found)
                if rank == 0 and len(taken) == after + 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return found

            loop._next = taking

        return before

    ended = run_job(tmp_path / "record", "sft", FAN_IN, before=stop(0), **arguments)
    assert ended.codes == [1, 1] and ended.error["message"] == "interrupted" and completed(steps) == []
    ended = run_job(tmp_path / "record", "sft", FAN_IN, before=stop(3), **arguments)
    assert ended.error["message"] == "interrupted"
    ((step, place),) = completed(steps)
    made = place.stat().st_ctime_ns, (place / "training.json").stat().st_ctime_ns
    assert step == 3
    ended = run_job(tmp_path / "record", "sft", FAN_IN, before=stop(0), **arguments)
    assert ended.error["message"] == "interrupted" and [s for s, _ in completed(steps)] == [3]
    assert (place.stat().st_ctime_ns, (place / "training.json").stat().st_ctime_ns) == made
    assert run_job(tmp_path / "record", "sft", FAN_IN, **arguments).codes == [0, 0]
    assert read_manifest(tmp_path / "sft").digests == read_manifest(whole / "sft").digests


def test_a_stop_said_again_does_not_cut_off_the_logs(inputs: dict[str, Any], tmp_path: Path) -> None:
    """As torchrun does when the other ranks have ended, while this one closes what it logs to."""

    def before(rank: int) -> None:
        take, close = loop._next, Metrics.__exit__

        def taking(given: Any) -> Any:
            if rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(given)

        def closing(self: Metrics, *error: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            close(self, *error)
            (tmp_path / "closed").touch()

        loop._next, Metrics.__exit__ = taking, closing

    ended = run_job(tmp_path / "record", "sft", ONE, before=before, **inputs, target=tmp_path / "sft")
    assert ended.codes == [1] and ended.error["message"] == "interrupted" and (tmp_path / "closed").exists()


def test_a_damaged_checkpoint_is_passed_over_and_named(inputs: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    arguments = inputs | {"target": tmp_path / "sft"}
    steps = Path(f"{tmp_path}/sft.steps")
    with Job(tmp_path / "record", "sft", DISJOINT_PP, **arguments) as job:
        job.wait_until(lambda: any(s >= 4 for s, _ in completed(steps)), timeout=150)
        for rank in range(3):
            job.kill(rank)
        job.end()
    file = next(completed(steps)[0][1].glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 7)
    ended = run_job(tmp_path / "record", "sft", FAN_IN, **arguments, timeout=150)
    assert ended.summary["steps"] == 8
    assert "not a whole checkpoint; the one before it is used" in ended.said
    # Another layout before the kill: the same to rounding.
    assert _losses(tmp_path) == pytest.approx(_losses(whole), rel=1e-4)


def test_a_second_start_waits_for_the_first_and_harms_nothing(inputs: dict[str, Any], tmp_path: Path) -> None:
    """A command that was given twice: neither harms the other's checkpoints."""
    arguments = inputs | {"target": tmp_path / "sft", "steps": 4}
    with Job(tmp_path / "record", "sft", FAN_IN, **arguments) as first:
        first.wait_until(_step_is_reached(tmp_path, 1), timeout=150)
        with Job(tmp_path / "again", "sft", FAN_IN, **arguments) as second:
            assert first.end().summary["steps"] == 4
            ended = second.end()
    assert "run record (process" in ended.said and "still writes its checkpoints there" in ended.said
    assert set(ended.codes) == {1} and "sft: exists" in ended.error["message"], ended.error
    assert read_manifest(tmp_path / "sft").digests


def test_a_data_set_that_changed_under_its_name_is_not_gone_on_with(inputs: dict[str, Any], tmp_path: Path) -> None:
    """As a data set on the hub may: of local files the identity of the run says it before."""
    arguments = inputs | {"target": tmp_path / "sft", "steps": 2, "optimizer": {"lr": 1e-4}}
    assert run_job(tmp_path / "record", "sft", ONE, **arguments, timeout=150).summary["steps"] == 2
    shutil.rmtree(tmp_path / "sft")
    (_, last), *_ = completed(Path(f"{tmp_path}/sft.steps"))
    record = json.loads((last / "training.json").read_text())
    assert record["data"]["rows"] == 24
    (last / "training.json").write_text(json.dumps(record | {"data": record["data"] | {"rows": 23}}))
    ended = run_job(tmp_path / "record", "sft", ONE, **arguments)
    assert ended.codes == [1] and "it has changed since" in ended.said and "(23 rows, 24 here)" in ended.said
    (last / "training.json").write_text(json.dumps(record))
    again = run_job(tmp_path / "record", "sft", ONE, **arguments, timeout=150).summary
    assert again["tokens"] == record["tokens"] > 0 and again["first_loss"] == record["first_loss"]


def test_validation_names_bad_samples_and_hears_a_signal(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Asked to stop in a long validation: it is left there, with the step before it saved."""
    data = write_data(tmp_path / "validation", 300)
    (tmp_path / "validation" / "5.png").unlink()
    arguments = inputs | {
        "target": tmp_path / "sft", "steps": 2, "optimizer": {"lr": 1e-4}, "saving": {"every": 0}, "validation": {"data": str(data), "every": 1, "samples": 0},
    }  # fmt: skip
    with Job(tmp_path / "record", "sft", FAN_IN, **arguments) as job:
        job.wait_until(_step_is_reached(tmp_path, 1), timeout=150)
        job.kill(1, signal.SIGUSR1)
        ended = job.end()
    assert ended.codes == [1, 1] and ended.error["message"] == "interrupted", ended.said
    assert [step for step, _ in completed(Path(f"{tmp_path}/sft.steps"))] == [1] and not _history(tmp_path).validation
    assert run_job(tmp_path / "record", "sft", FAN_IN, **arguments, timeout=150).summary["steps"] == 2
    assert list(_history(tmp_path).validation) == [2]
    assert [e for e in _history(tmp_path).events if e.kind == "bad sample" and "train.jsonl:6" in e.text]


def _history(base: Path) -> history.History:
    found = history.read(base / "record")
    assert found is not None
    return found


def _losses(base: Path) -> list[float]:
    return [values["loss"] for values in _history(base).steps.values()]


def _step_is_reached(base: Path, step: int) -> Any:
    def there() -> bool:
        found = history.read(base / "record")
        return found is not None and any(n >= step for n in found.steps)

    return there
