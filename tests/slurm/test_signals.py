"""Slurm's one signal that a job has to stop, when it comes before anybody hears it: no job is lost, and none runs into its end."""

import json
import re
import time
from pathlib import Path

import pytest

from launchers.slurm_step import SIGNALS
from tests.slurm.runs import (
    SMALL,
    ended_well,
    finished,
    kinds,
    ranks,
    slowed,
    submit,
    told,
    wait_until,
    wait_writing,
)


def slow_once(work: Path, seconds: float) -> str:
    """A word that makes the first batch job's setup take so long; `in_setup` says that it has begun."""
    return f"executor.setup=mkdir {work}/in_setup 2>/dev/null && sleep {seconds} || true"


def in_setup(work: Path) -> bool:
    return (work / "in_setup").exists()


def allow_minutes(run, cluster, minutes: int) -> None:
    for step in run.steps:
        cluster.run("scontrol", "update", f"JobId={step.state().job_id}", f"TimeLimit={minutes}")


def requeued(run) -> dict:
    wait_until(lambda: "requeued" in kinds(run), 40, run)
    return next(e for e in run.step("import").events() if e["event"] == "requeued")


def sruns(run) -> list[int]:
    """pids of the ``srun`` of the import and its helper."""
    job, found = bytes(run.step("import").directory / "JOB.json"), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == b"srun" and job in words:
            found.append(int(process.name))
    return found


def ignored(pid: int) -> set[int]:
    """Which of the signals that ask a step to stop a process ignores."""
    found = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return {s for s in SIGNALS if int(found[1], 16) >> (s - 1) & 1}


def test_a_signal_during_setup_does_not_end_the_job_and_its_ranks_hear_the_next(home, model, tmp_path, cluster):
    words = (*slowed(tmp_path, 0.1), slow_once(tmp_path, 4))
    run = submit(home, f"model={model}", f"workdir={tmp_path}/out", *SMALL, *words)
    wait_until(lambda: in_setup(tmp_path), 30, run)
    for name in ("USR1", "USR2"):
        cluster.run("scancel", f"--signal={name}", "--batch", str(run.step("import").state().job_id))
    wait_writing(run)
    assert len(ranks(run, "import")) == 3 and sruns(run)
    for pid in (*ranks(run, "import"), *sruns(run)):
        assert not ignored(pid), Path(f"/proc/{pid}/cmdline").read_bytes()
    ended_well(run, model, tmp_path)
    assert kinds(run).count("started") == 1 and "retry" not in kinds(run)


def test_a_limit_that_came_near_during_setup_requeues_the_step_before_its_ranks_start(home, model, tmp_path, cluster):
    words = ("executor.time=1", "executor.signal=USR1@55", slow_once(tmp_path, 8))
    run = submit(home, f"model={model}", f"workdir={tmp_path}/out", *SMALL, *words)
    assert requeued(run)["reason"] == "its time limit was near", told(run)
    assert not list((run.step("import").directory / "logs").iterdir()), told(run)
    allow_minutes(run, cluster, 10)
    ended_well(run, model, tmp_path)


def test_a_step_that_is_preempted_during_setup_makes_way_before_its_ranks_start(home, model, tmp_path, cluster):
    run = submit(home, f"model={model}", f"workdir={tmp_path}/out", *SMALL, slow_once(tmp_path, 5))
    wait_until(lambda: in_setup(tmp_path), 30, run)
    cluster.run("sbatch", "--qos=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    assert requeued(run)["reason"] == "preempted", told(run)
    assert not list((run.step("import").directory / "logs").iterdir()), told(run)
    ended_well(run, model, tmp_path)


@pytest.mark.parametrize("extended", [False, True])
def test_a_step_whose_signal_was_lost_watches_the_limit_itself(home, model, tmp_path, cluster, extended):
    """Slurm's own signal is a second before ten minutes; the step is told that it should have come 12 s after the start."""
    words = ("executor.time=10", "executor.signal=USR1@1", *slowed(tmp_path, 0.1), slow_once(tmp_path, 3))
    run = submit(home, f"model={model}", f"workdir={tmp_path}/out", *SMALL, *words)
    plan = run.step("import").directory / "STEP.json"
    before = plan.read_text()
    plan.write_text(json.dumps(json.loads(before) | {"signal_seconds": 588}))
    wait_until(lambda: finished(tmp_path), 30, run)
    if extended:
        allow_minutes(run, cluster, 20)
        time.sleep(14)
        assert "requeued" not in kinds(run), told(run)
    else:
        event = requeued(run)
        assert event["reason"] == "its time limit was near" and event["progress"] > 0, told(run)
    plan.write_text(before)
    ended_well(run, model, tmp_path)
    assert kinds(run).count("started") == (1 if extended else 2)
