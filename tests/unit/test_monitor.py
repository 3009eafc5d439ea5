"""The state of runs: what their jobs wrote, what squeue says, what sacct says, which is believed; and Slurm's commands."""

import json
import os
import re
import time
from dataclasses import replace

import pytest

from launchers import slurm_commands
from launchers.slurm_commands import Partition, QueuedJob, SlurmError, SlurmSilent
from mimo_jobs import commands, monitor
from mimo_jobs.errors import UserError
from tests.unit.test_records import make_run

LONG_AGO = 3600.0
GONE = 2**22 + 1  # beyond the largest pid


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Slurm:
    """A stand-in for squeue, sacct and scancel; counts what it was asked."""

    def __init__(self) -> None:
        self.queue: list[QueuedJob] = []
        self.accounting: list[QueuedJob] = []
        self.silent: SlurmError | None = None
        self.asked: list[str] = []
        self.cancelled: list[int] = []

    def squeue(self, seconds: float = 5.0) -> dict[int, QueuedJob]:
        self.asked.append("squeue")
        if self.silent:
            raise self.silent
        return {j.job_id: j for j in self.queue}

    def sacct(self, ids, seconds: float = 3.0) -> dict[int, QueuedJob]:
        self.asked.append("sacct")
        return {j.job_id: j for j in self.accounting if j.job_id in set(ids)}


@pytest.fixture
def cluster(monkeypatch) -> Slurm:
    stand_in = Slurm()
    monkeypatch.setattr(slurm_commands, "queue", stand_in.squeue)
    monkeypatch.setattr(slurm_commands, "accounting", stand_in.sacct)
    monkeypatch.setattr(slurm_commands, "cancel", lambda ids: stand_in.cancelled.extend(ids))
    return stand_in


def tell(step, *words: str, ago: float = LONG_AGO) -> None:
    """Append events: ``"submitted job_id=7"``, all ``ago`` seconds old."""
    with (step.directory / "events.jsonl").open("a") as file:
        for word in words:
            kind, *fields = word.split(" ")
            pairs = (f.partition("=")[::2] for f in fields)
            event = {"time": time.time() - ago, "event": kind} | {
                k: int(v) if v.isdigit() else v.replace("_", " ") for k, v in pairs
            }
            file.write(json.dumps(event) + "\n")


def job(number: int, state: str, **more) -> QueuedJob:
    return QueuedJob(number, state, **more)


SUBMITTED = ("submitting title=T", "submitted job_id=7")
STARTED = (*SUBMITTED, "started job_id=7 nodes=n1 gpus=8")
REQUEUED = (*STARTED, "requeued reason=its_time_limit_was_near job_id=7")


@pytest.mark.parametrize(
    ("words", "queue", "accounting", "state", "reason"),
    [
        # a job's own last word needs nobody else
        ((*STARTED, "done"), [], [], "done", ""),
        ((*STARTED, "failed exit_code=1 reason=bad"), [job(7, "COMPLETED")], [], "failed", "bad"),
        ((*STARTED, "cancelled"), [job(7, "RUNNING")], [], "cancelled", ""),
        # waiting
        (SUBMITTED, [job(7, "PENDING", reason="Resources")], [], "queued", "waits for free nodes"),
        (SUBMITTED, [job(7, "PENDING", reason="(Dependency)")], [], "queued", "waits for the step before"),
        (SUBMITTED, [job(7, "PENDING", reason="SomethingNew")], [], "queued", "SomethingNew"),
        (SUBMITTED, [job(7, "PENDING", reason="DependencyNeverSatisfied")], [], "queued", "did not succeed"),
        (SUBMITTED, [job(7, "CONFIGURING")], [], "queued", ""),
        (REQUEUED, [job(7, "PENDING", reason="BeginTime")], [], "queued", "its time limit was near; starts again in a moment"),
        (STARTED, [job(7, "PENDING", reason="BeginTime")], [], "queued", "starts again"),  # a node failed: no word of ours
        (REQUEUED, [job(7, "REQUEUE_HOLD", reason="JobHeldUser")], [], "queued", "scontrol release"),
        # running
        (SUBMITTED, [job(7, "RUNNING", nodes="n[1-2]")], [], "running", ""),
        (STARTED, [job(7, "RUNNING")], [], "running", ""),
        (STARTED, [job(7, "COMPLETING")], [], "running", ""),
        (STARTED, [job(7, "SUSPENDED")], [], "running", ""),
        (REQUEUED, [job(7, "RUNNING")], [], "running", ""),
        ((*STARTED, "retry reason=rank_3_was_killed"), [job(7, "RUNNING")], [], "running", "rank 3"),
        # ended, and only Slurm knows how
        (STARTED, [job(7, "FAILED", exit_code="2:0")], [], "failed", r"failed \(exit code 2:0\).*slurm.log"),
        (STARTED, [], [job(7, "NODE_FAIL")], "failed", "a node failed"),
        (STARTED, [], [job(7, "OUT_OF_MEMORY")], "failed", "ran out of host memory"),
        (STARTED, [], [job(7, "TIMEOUT")], "failed", "time limit"),
        (STARTED, [], [job(7, "SOMETHING_NEW")], "failed", "something_new"),
        (STARTED, [job(7, "CANCELLED")], [], "cancelled", "cancelled"),
        (SUBMITTED, [job(7, "CANCELLED")], [], "cancelled", "cancelled"),
        (STARTED, [], [job(7, "COMPLETED")], "failed", "left no word"),
        # squeue is asked before sacct
        (STARTED, [job(7, "RUNNING")], [job(7, "NODE_FAIL")], "running", ""),
        # nobody knows it: accounting is off, or purged
        (STARTED, [], [], "failed", "ended without a word.*accounting off"),
        (SUBMITTED, [], [], "cancelled", "left the queue without having started"),
        (SUBMITTED, [job(8, "RUNNING", name="T")], [], "cancelled", "left the queue"),  # another of that name
        # its id was lost
        (SUBMITTED[:1], [job(9, "PENDING", name="T", reason="Priority")], [], "queued", "waits for its turn"),
        (SUBMITTED[:1], [job(9, "RUNNING", name="T")], [], "running", ""),
        (SUBMITTED[:1], [job(9, "RUNNING", name="other")], [], "cancelled", "submission was cut short; nemo-run resume"),
        (SUBMITTED[:1], [], [], "cancelled", "submission was cut short"),
    ],
)  # fmt: skip
def test_the_state_of_a_step(home, cluster, words, queue, accounting, state, reason):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *words)
    cluster.queue, cluster.accounting = queue, accounting
    seen = monitor.look([run])[0].steps[0].state
    assert seen.state == state and re.search(reason, seen.reason), seen
    ended = state in ("done", "failed", "cancelled")
    if ended and queue + accounting != []:  # what only Slurm knew stays known when it has forgotten it
        cluster.queue, cluster.accounting = [], []
        again = monitor.look([run])[0].steps[0].state
        assert (again.state, again.reason) == (seen.state, seen.reason)
    if state in ("queued", "running") and not words[-1].startswith("submitting"):
        assert run.steps[0].state().state in ("queued", "running"), "a passing state was written down"


@pytest.mark.parametrize(("words", "state"), [(SUBMITTED[:1], "queued"), (SUBMITTED, "queued"), (STARTED, "running")])
def test_what_was_written_a_moment_ago_is_not_judged_yet(home, cluster, words, state):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *words, ago=2)
    assert monitor.look([run])[0].steps[0].state.state == state == run.steps[0].state().state


@pytest.mark.parametrize(
    "error", [SlurmSilent("squeue did not answer within 5 s"), SlurmError("squeue: Access denied")]
)
@pytest.mark.parametrize(("words", "state"), [(SUBMITTED, "queued"), (STARTED, "running"), (SUBMITTED[:1], "queued")])
def test_when_slurm_is_silent_nothing_is_judged_and_a_note_says_so(home, cluster, error, words, state):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *words)
    cluster.silent = error
    seen = monitor.look([run])[0]
    assert seen.steps[0].state.state == state == seen.state and str(error) in seen.notes[0]
    assert len(run.steps[0].events()) == len(words) and "sacct" not in cluster.asked


def test_slurm_is_asked_once_for_all_runs_and_not_at_all_for_ended_or_local_ones(home, cluster):
    runs = [make_run(home, f"r{i}") for i in range(5)]
    for i, run in enumerate(runs):
        for n, step in enumerate(run.steps):
            tell(step, f"submitted job_id={10 * i + n}")
    cluster.queue = [job(0, "PENDING")]
    monitor.look(runs)
    assert cluster.asked == ["squeue", "sacct"]
    cluster.asked.clear()
    ended = make_run(home, "e")
    for step in ended.steps:
        tell(step, "skipped")
    here = make_run(home, "l", executor="local", host=os.uname().nodename, pid=os.getpid())
    tell(here.steps[0], "started")
    assert [s.state for s in monitor.look([ended, here])] == ["done", "running"] and cluster.asked == []


def test_a_word_that_came_while_slurm_was_asked_is_heard(home, cluster, monkeypatch):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *STARTED)

    def squeue(seconds: float = 5.0):
        tell(run.steps[0], "done", ago=0)
        return {7: job(7, "COMPLETED")}

    monkeypatch.setattr(slurm_commands, "queue", squeue)
    assert monitor.look([run])[0].state == "done"


def test_a_child_that_slurm_ended_with_its_parent_says_whose_fault_it_is(home, cluster):
    run = make_run(home, "r", ("import", "export", "verify"))
    tell(run.steps[0], *STARTED, "failed reason=no_space")
    tell(run.steps[1], "submitted job_id=8")
    cluster.queue = [job(8, "CANCELLED", reason="Dependency")]
    seen = monitor.look([run])[0]
    assert [s.state.state for s in seen.steps] == ["failed", "cancelled", "waiting"] and seen.state == "failed"
    assert seen.steps[1].state.reason == seen.steps[2].state.reason == "did not start: import failed"


def test_a_child_that_ran_in_an_earlier_submission_says_so_too(home, cluster):
    run = make_run(home, "r", ("import", "export"))
    tell(run.steps[0], *STARTED, "failed reason=no_space")
    tell(run.steps[1], "submitted job_id=8", "started", "failed", "submitting title=E", "submitted job_id=9")
    cluster.queue = [job(9, "CANCELLED")]
    assert monitor.look([run])[0].steps[1].state.reason == "did not start: import failed"


def test_a_long_job_that_completed_just_now_has_time_to_be_heard(home, cluster):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *STARTED, ago=LONG_AGO)
    cluster.queue = [replace(job(7, "COMPLETED"), ended=time.time() - 1)]
    assert monitor.look([run])[0].steps[0].state.state != "failed"


def test_a_job_that_completed_without_a_word_is_not_queued_for_ever(home, cluster):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *SUBMITTED)
    cluster.accounting = [job(7, "COMPLETED")]  # a line of `setup` ended the script
    assert monitor.look([run])[0].steps[0].state.state == "failed"


def test_a_job_whose_id_was_lost_is_not_taken_for_an_ended_one_of_the_same_name(home, cluster):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *STARTED, "failed reason=x", "submitting title=T")
    cluster.queue = [job(11, "PENDING", name="T"), job(7, "FAILED", name="T")]  # squeue sorts by state
    assert monitor.look([run])[0].steps[0].state.state == "queued"


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        (("done", "skipped"), "done"), (("done", "failed"), "failed"), (("failed", "cancelled"), "failed"), (("done", "cancelled"), "cancelled"),
        (("running", "queued"), "running"), (("done", "queued"), "queued"), (("waiting", "waiting"), "waiting"), (("done", "waiting"), "waiting"),
        (("failed", "running"), "failed"),
    ],
)  # fmt: skip
def test_the_state_of_the_whole(home, states, whole):
    run = make_run(home, "r")
    seen = monitor.SeenRun(
        run, [monitor.Seen(s, monitor.StepState(state=state)) for s, state in zip(run.steps, states, strict=True)]
    )
    assert seen.state == whole and seen.active == any(s in ("queued", "running") for s in states)


# ----------------------------------------------------------------------------------------------------------------- local


def local(home, pid: int, host: str | None = None, steps=("import", "export")):
    return make_run(home, "l", steps, executor="local", host=host or os.uname().nodename, pid=pid)


def test_a_local_run_whose_process_is_gone_has_failed(home):
    run = local(home, GONE)
    tell(run.steps[0], "started")
    seen = monitor.look([run])[0]
    assert [s.state.state for s in seen.steps] == ["failed", "waiting"] and "is gone" in seen.steps[0].state.reason
    assert seen.steps[1].state.reason == "did not start: import failed"


def test_a_local_run_of_another_host_is_not_declared_dead(home):
    run = local(home, os.getpid(), host="another-login-node")
    tell(run.steps[0], "started")
    monitor.look([run])
    assert run.steps[0].state().state == "running"


def test_waiting_for_a_local_chain_does_not_end_between_two_steps(home, monkeypatch):
    run = local(home, os.getpid())
    tell(run.steps[0], "started", "done")
    monkeypatch.setattr(monitor.time, "sleep", lambda s: tell(run.steps[1], "started", "done"))
    assert monitor.wait(run, lambda seen: None).state == "done"


def test_waiting_ends_when_every_step_has_and_goes_on_while_slurm_is_silent(home, cluster, monkeypatch):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *STARTED)
    cluster.silent = SlurmSilent("squeue: not found")
    turns = []

    def sleep(seconds: float) -> None:
        turns.append(seconds)
        if len(turns) == 2:
            cluster.silent, cluster.queue = None, [job(7, "RUNNING")]
        if len(turns) == 3:
            tell(run.steps[0], "done", ago=0)

    monkeypatch.setattr(monitor.time, "sleep", sleep)
    assert monitor.wait(run, lambda seen: None).state == "done" and len(turns) == 3


# -------------------------------------------------------------------------------------------------------------- commands


def test_status_tells_every_step_and_json_is_the_same(home, cluster, capsys):
    run = make_run(home, "r", ("import", "export"))
    tell(run.steps[0], *STARTED, "failed reason=disk_full exit_code=1")
    assert commands.status("r", as_json=False) == 0
    out = capsys.readouterr().out
    assert "import failed: disk full" in out and "nemo-run logs r.import" in out and "nemo-run resume r" in out
    assert commands.status("r", as_json=True, wait=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "failed" and [s["state"] for s in found["steps"]] == ["failed", "waiting"]
    assert commands.status(None, as_json=True) == 0
    assert [r["run_id"] for r in json.loads(capsys.readouterr().out)["runs"]] == ["r"]


def test_status_of_all_passes_over_damaged_records(home, cluster, capsys):
    make_run(home, "good")
    (home / "runs/bad").mkdir()
    (home / "runs/bad/RUN.json").write_text("{")
    assert commands.list_runs(as_json=True) == 0
    assert [r["run_id"] for r in json.loads(capsys.readouterr().out)["runs"]] == ["good"]


def test_cancel_ends_dependents_first_and_writes_down_those_that_never_ran(home, cluster, capsys):
    run = make_run(home, "r", ("import", "export", "verify"))
    titles = [f"mimo:r.{s.name}" for s in run.steps]
    tell(run.steps[0], f"submitting title={titles[0]}", "submitted job_id=7", "started job_id=7")
    tell(run.steps[1], f"submitting title={titles[1]}", "submitted job_id=8")
    tell(run.steps[2], f"submitting title={titles[2]}", "submitted job_id=9")
    cluster.queue = [job(7 + i, "PENDING" if i else "RUNNING", name=t) for i, t in enumerate(titles)]
    cluster.queue.append(job(10, "RUNNING", name="another"))
    commands.cancel("r")
    assert (
        cluster.cancelled == [9, 8, 7]
        and "import (job 7), export (job 8), verify (job 9) cancelled" in capsys.readouterr().out
    )
    assert [s.state().state for s in run.steps] == [
        "running",
        "cancelled",
        "cancelled",
    ]  # a running one has its own last word
    cluster.queue = [job(7, "CANCELLED", name=titles[0])]
    assert monitor.look([run])[0].state == "cancelled"
    commands.cancel("r")
    assert "nothing of it is queued or runs" in capsys.readouterr().out


def test_cancel_does_nothing_while_slurm_is_silent(home, cluster):
    run = make_run(home, "r", ("import",))
    tell(run.steps[0], *STARTED)
    cluster.silent = SlurmSilent("squeue: not found")
    with pytest.raises(UserError, match=r"not found.*nothing was cancelled"):
        commands.cancel("r")
    assert cluster.cancelled == [] and len(run.steps[0].events()) == 3


# ---------------------------------------------------------------------------------------------- what squeue and sacct say


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Put commands first on PATH: name, shell text."""

    def put(name: str, body: str, mode: int = 0o755) -> None:
        path = tmp_path / "tools" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(mode)

    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    return put


def test_squeue_is_read_line_by_line(tools):
    tools(
        "squeue",
        r"printf '7\tPENDING\tmimo:r.import\tNone\t\tN/A\n8\tCOMPLETED\ta b\tPrior\tn[1-2]\t2026-11-22T18:00:00\nJOBID\tSTATE\n9\tRUNNING\n'",
    )
    assert slurm_commands.queue() == {
        7: QueuedJob(7, "PENDING", "mimo:r.import"),
        8: QueuedJob(8, "COMPLETED", "a b", "Prior", "n[1-2]", ended=time.mktime((2026, 11, 22, 18, 0, 0, 0, 0, -1))),
    }


def test_sacct_is_read_and_its_absence_is_no_error(tools):
    tools(
        "sacct",
        "echo '7|CANCELLED by 1000|mimo:x|None|n1|0:15|Unknown'; echo '8|FAILED|y|NonZeroExitCode|None assigned|1:0|2026-11-22T18:00:00'; echo 'x|y'",
    )
    found = slurm_commands.accounting([7, 8])
    assert found[7] == QueuedJob(7, "CANCELLED", "mimo:x", "", "n1", "0:15") and found[8].exit_code == "1:0"
    assert set(found) == {7, 8} and slurm_commands.accounting([]) == {}
    tools("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm_commands.accounting([7]) == {}
    tools("sacct", "exec sleep 5")
    assert slurm_commands.accounting([7], 0.1) == {}


@pytest.mark.parametrize("state", [*slurm_commands.ACTIVE, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"])
def test_states_that_wait_are_active(state):
    found = QueuedJob(1, state)
    assert found.active or not found.waiting
    assert slurm_commands.described(found)


SINFO = r"printf 'gpu*\t2\t64\t512000\tgpu:h100:8(S:0-1)\t1-00:00:00\tup\ngpu*\t1\t32\t256000\tgpu:4\t1-00:00:00\tup\ncpu\t3\t16\t64000+\t(null)\tinfinite\tdown\nodd line\n'"


def test_partitions_are_read_from_one_sinfo_their_smallest_node_counts(tools):
    tools("sinfo", SINFO)
    assert slurm_commands.partitions() == {
        "gpu": Partition("gpu", True, 3, 32, 256000, 8, "1-00:00:00", True),
        "cpu": Partition("cpu", False, 3, 16, 64000, 0, "infinite", False),
    }


def test_a_command_that_is_missing_slow_or_unheard_is_silent_and_one_that_refuses_is_not(tools, tmp_path, monkeypatch):
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmSilent, match=r"sinfo: not found.*PATH"):
        slurm_commands.partitions()
    monkeypatch.setenv("PATH", path)
    tools("sinfo", "exec sleep 9")
    with pytest.raises(SlurmSilent, match=r"did not answer within 0\.1 s"):
        slurm_commands.partitions(0.1)
    tools(
        "sinfo",
        "echo 'slurm_load_partitions: Unable to contact slurm controller (connect failure)' >&2; exit 1",
    )
    with pytest.raises(SlurmSilent, match="Unable to contact"):
        slurm_commands.partitions()
    tools("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid qos' >&2; exit 1")
    with pytest.raises(SlurmError, match=r"^sbatch: Batch job submission failed: Invalid qos$") as caught:
        slurm_commands.submit("x.sh")
    assert not isinstance(caught.value, SlurmSilent)


def test_a_command_that_may_not_be_run_is_silent_too(tools, tmp_path, monkeypatch):
    tools("squeue", "", 0o644)
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    with pytest.raises(SlurmSilent):
        slurm_commands.queue()


def test_slurms_own_variables_do_not_reach_its_commands(tmp_path, monkeypatch):
    for name in ("SBATCH_PARTITION", "SQUEUE_FORMAT", "SLURM_JOB_ID", "RANK", "MASTER_ADDR", "SLURM_CONF", "HOME2"):
        monkeypatch.setenv(name, "x")
    found = slurm_commands.environment({"MORE": "1"})
    assert {
        n: n in found for n in ("SBATCH_PARTITION", "SQUEUE_FORMAT", "SLURM_JOB_ID", "RANK", "MASTER_ADDR")
    } == dict.fromkeys(("SBATCH_PARTITION", "SQUEUE_FORMAT", "SLURM_JOB_ID", "RANK", "MASTER_ADDR"), False)
    assert found["SLURM_CONF"] == found["HOME2"] == "x" and found["MORE"] == "1"


@pytest.mark.parametrize("answer", ["12", "12;cluster", " 12 \n"])
def test_the_id_of_a_queued_job(tools, answer):
    tools("sbatch", f"printf '{answer}'")
    assert slurm_commands.submit("x.sh") == 12


def test_an_sbatch_that_says_more_than_the_id(tools):
    tools("sbatch", "echo 'Welcome: your project has 12 hours left'; echo 34")
    assert slurm_commands.submit("x.sh") == 34
